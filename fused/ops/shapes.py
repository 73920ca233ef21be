"""Shapes and weights that several operators share.

B batch, L tokens, E channels, D model width, N states a channel, K convolution width, R rank of dt, G groups of channels.
"""

from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

Tokens = Float[Tensor, "B L E"]
State = Float[Tensor, "B E N"]


class DirectionWeights(NamedTuple):
    """The weights of one direction of a Mamba mixer, behind in_proj and in front of out_proj.

    Parameters may have any dtype that the operator reads; `A` is A itself or, where an operator is told `A_is_log`, log(-A).
    """

    conv: Tensor  # (E, K)
    conv_bias: Tensor | None  # (E,)
    x_proj: Tensor  # (R + 2N, E)
    dt_proj: Tensor  # (E, R)
    dt_bias: Tensor  # (E,)
    A: Tensor  # (E, N)
    D: Tensor  # (E,)
