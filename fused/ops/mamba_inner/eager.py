"""One direction of a mixer by the public operators, for any backend."""

from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor

from fused.ops.causal_conv1d import api as conv
from fused.ops.selective_scan import api as scan
from fused.ops.shapes import DirectionWeights


def one_direction_eager(
    x: Tensor, weights: DirectionWeights, *, reverse: bool, backend: str, z: Tensor | None = None,
    state: Sequence[Tensor] | None = None, x_proj: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:  # fmt: skip
    """Return y (B, L, E) of x (B, L, E), and the state that leaves: conv state (B, E, K-1), SSM state (B, E, N).

    A of the weights is A itself. z (B, L, E) is the gate. `state` enters, zero without it. `x_proj` is the module that holds
    that weight, if it is to be called as a module.
    """
    conv_state, ssm_state = state or (None, None)
    R, N = weights.dt_proj.shape[1], weights.A.shape[1]
    c, conv_state = conv.causal_conv1d(
        x, weights.conv, weights.conv_bias, initial_state=conv_state, reverse=reverse, backend=backend
    )  # fmt: skip
    dt, B, C = (F.linear(c, weights.x_proj) if x_proj is None else x_proj(c)).split((R, N, N), dim=-1)
    delta = F.linear(dt, weights.dt_proj)  # the scan adds dt_proj's bias, unrounded
    y, ssm_state = scan.selective_scan(
        c, delta, weights.A, B, C, weights.D, z, weights.dt_bias, initial_state=ssm_state, reverse=reverse, backend=backend
    )  # fmt: skip
    return y, (conv_state, ssm_state)
