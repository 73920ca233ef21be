"""Shapes and weights that several operators share.

B batch, L tokens, E channels, D model width, N states a channel, K convolution width, R rank of dt, G groups of channels.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from fused.runtime.dtypes import accumulation_dtype

Tokens = Float[Tensor, "B L E"]
Mixing = Float[Tensor, "B L *G N"]
State = Float[Tensor, "B E N"]
Rows = Float[Tensor, "*B D"]


class Linear(NamedTuple):
    """The parameters of a linear layer."""

    weight: Tensor  # (out, in)
    bias: Tensor | None  # (out,)


class DirectionWeights(NamedTuple):
    """The weights of one direction of a Mamba mixer, between in_proj and out_proj.

    Parameters may have any dtype that the operator reads; `A` is A itself or, where an operator is told `A_is_log`, log(-A).
    """

    conv: Tensor  # (E, K)
    conv_bias: Tensor | None  # (E,)
    x_proj: Tensor  # (R + 2N, E)
    dt_proj: Tensor  # (E, R)
    dt_bias: Tensor  # (E,)
    A: Tensor  # (E, N)
    D: Tensor  # (E,)


Weights = Sequence[Tensor | None]
"""A `DirectionWeights` as a mixer's operator takes it; empty for an absent direction."""


def residual_dtype_of(x: Tensor, residual: Tensor | None, residual_in_fp32: bool) -> torch.dtype:
    """Return the dtype in which a norm stores the residual stream: the residual's own, else at least float32 or x's."""
    if residual is not None:
        return residual.dtype
    return accumulation_dtype(x.dtype) if residual_in_fp32 else x.dtype


def dense(x: Tensor) -> Tensor:
    """Return x (..., channels) with unit stride along its last axis, a copy where it has another."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
