"""The directions of a mixer by the operators, for any backend."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fused.ops.causal_conv1d import api as conv
from fused.ops.causal_conv1d.eager import convolve_both_directions
from fused.ops.mamba_inner import segments
from fused.ops.selective_scan import api as scan
from fused.ops.selective_scan.cpu import bidirectional_scan_cpu
from fused.ops.selective_scan.eager import scan_both_directions
from fused.ops.shapes import DirectionWeights
from fused.runtime.dtypes import accumulation_dtype
from fused.runtime.exporting import is_exporting

Call = Callable[[Tensor], Tensor]


def one_direction_eager(
    x: Tensor, weights: DirectionWeights, *, reverse: bool, backend: str, z: Tensor | None = None,
    state: Sequence[Tensor] | None = None, conv1d: Call | None = None, x_proj: Call | None = None, dt_proj: Call | None = None,
    d_conv: int = 0,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:  # fmt: skip
    """Return y (B, L, E) of x (B, L, E), and the state that leaves: conv state (B, E, K-1), SSM state (B, E, N).

    A of the weights is A itself. z (B, L, E) is the gate. `state` enters, zero without it. A module that is given, `conv1d`,
    `x_proj` or `dt_proj`, is called, and its weight and bias are not read. `conv1d` needs its width K as `d_conv`.
    """
    conv_state, ssm_state = state or (None, None)
    if conv1d is None:
        c, conv_state = conv.causal_conv1d(
            x, weights.conv, weights.conv_bias, initial_state=conv_state, reverse=reverse, backend=backend
        )  # fmt: skip
    else:
        c, conv_state = _call_conv1d(conv1d, x, conv_state, d_conv, reverse)
    dt_B_C, N = F.linear(c, weights.x_proj) if x_proj is None else x_proj(c), weights.A.shape[1]
    dt, B, C = dt_B_C.split((dt_B_C.shape[-1] - 2 * N, N, N), dim=-1)
    if dt_proj is None:
        delta, dt_bias = F.linear(dt, weights.dt_proj), weights.dt_bias  # the scan adds the bias, unrounded
    else:
        delta, dt_bias = dt_proj(dt), None
    y, ssm_state = scan.selective_scan(
        c, delta, weights.A, B, C, weights.D, z, dt_bias, initial_state=ssm_state, reverse=reverse, backend=backend
    )  # fmt: skip
    return y, (conv_state, ssm_state)


def _call_conv1d(conv1d: Call, x: Tensor, state: Tensor | None, K: int, reverse: bool) -> tuple[Tensor, Tensor]:
    """Return silu(conv1d(x)) (B, L, E) of x (B, L, E), and the last K-1 inputs (B, E, K-1) in the order of the scan.

    `conv1d` takes (B, E, tokens) and pads K-1 zeros on both sides, as upstream's does. `state` (B, E, K-1) is the inputs before
    x, and is put in front of it.
    """
    inputs = (x.flip(1) if reverse else x).transpose(1, 2)
    inputs = inputs if state is None else torch.cat((state, inputs), dim=2)
    first, L = inputs.shape[2] - x.shape[1], x.shape[1]
    c = F.silu(conv1d(inputs)[:, :, first : first + L]).transpose(1, 2).to(x.dtype)
    last = F.pad(inputs, (max(0, K - 1 - inputs.shape[2]), 0))
    return c.flip(1) if reverse else c, last[:, :, last.shape[2] - (K - 1) :]


def both_directions_eager(x: Tensor, directions: Sequence[DirectionWeights], z: Tensor, backend: str = "torch") -> Tensor:
    """Return y (B, L, E) of both directions over x (B, L, E) under one gate z (B, L, E), without states, by "torch" or "cpu".

    A of the weights is log(-A). Between the two ends, tokens of the backward direction are in the order of its scan, so that
    an operation takes both directions.
    """
    if backend == "cpu" and not is_exporting():
        return _both_directions_cpu(x, directions, z)
    if segments.takes(x, directions):
        return segments.both_directions_in_segments(x, directions, z)
    others: Any = [(w.conv, w.conv_bias, w.dt_proj, w.dt_bias, w.A, w.D) for w in directions]
    stacked: Any = (None if pair[0] is None else torch.stack(pair) for pair in zip(*others, strict=True))
    weight, bias, dt_proj, dt_bias, A_log, D = stacked
    c = convolve_both_directions(x, weight, bias)
    dt_B_C = torch.stack([F.linear(tokens, w.x_proj) for tokens, w in zip(c, directions, strict=True)])
    dt, B, C = dt_B_C.split((dt_proj.shape[2], A_log.shape[2], A_log.shape[2]), dim=-1)
    delta = torch.bmm(dt.flatten(1, 2), dt_proj.mT).unflatten(1, x.shape[:2])  # the scan adds dt_proj's bias, unrounded
    A = -A_log.to(accumulation_dtype(A_log.dtype)).exp()
    return scan_both_directions(c, delta, A, B, C, D, z, dt_bias)


def _both_directions_cpu(x: Tensor, directions: Sequence[DirectionWeights], z: Tensor) -> Tensor:
    """Return what `both_directions_eager` returns, operator by operator, by the kernels for CPUs."""
    inputs = []
    for w, reverse in zip(directions, (False, True), strict=True):
        c, _ = conv.causal_conv1d(x, w.conv, w.conv_bias, reverse=reverse, backend="cpu")
        dt, B, C = F.linear(c, w.x_proj).split((w.dt_proj.shape[1], w.A.shape[1], w.A.shape[1]), dim=-1)
        A = -w.A.to(accumulation_dtype(w.A.dtype)).exp()
        inputs.append((c, F.linear(dt, w.dt_proj), A, B, C, w.D, w.dt_bias))
    pairs: Any = zip(*inputs, strict=True)
    u, delta, As, Bs, Cs, Ds, biases = pairs
    return bidirectional_scan_cpu(u, delta, As, Bs, Cs, Ds, z, biases, softplus=True)
