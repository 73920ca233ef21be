"""dt_proj with its bias and softplus in Triton: the scan's step sizes, every direction in one launch.

    delta = softplus(dt W + bias)        dt (tokens, R), W (R, E)

The product and what follows are in float32, and delta is rounded once. So the scan, whose instructions are dearer, has no
softplus to make.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import launching_on

LOW = {"TOKENS": 64, "CHANNELS": 128, "num_warps": 4}
FULL = {"TOKENS": 16, "CHANNELS": 32, "num_warps": 4}  # float32 has no tensor cores: larger products do not fit in registers


@triton.jit
def _softplus(x):
    """max(x, 0) + log1p(w), w = exp(-|x|); log1p(w) = 2 artanh(w / (2 + w)) by a minimax polynomial, as in the scan."""
    w = tl.exp(-tl.abs(x))
    s = w / (2.0 + w)
    q = s * s
    p = tl.fma(q, tl.fma(q, tl.fma(q, tl.full(q.shape, 0.28024462, tl.float32), 0.27999142), 0.40021700), 0.66666412)
    return tl.maximum(x, 0.0) + tl.fma(s * q, p, 2.0 * s)


@triton.jit(do_not_specialize=["M"])
def steps_kernel(
    rows, weight, bias0, bias1, delta, M, E, R, rows_direction, row,
    RANK: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    d = tl.program_id(2).to(tl.int64)
    m = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    e, r = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS), tl.arange(0, RANK)
    inside = (m < M)[:, None] & (r < R)[None, :]
    dt = tl.load(rows + d * rows_direction + m[:, None] * row + r[None, :], mask=inside, other=0.0)
    known = (r < R)[:, None] & (e < E)[None, :]
    W = tl.load(weight + d * R * E + r[:, None] * E + e[None, :], mask=known, other=0.0)
    bias = bias0 if tl.program_id(2) == 0 else bias1
    shift = tl.load(bias + e, mask=e < E, other=0.0).to(tl.float32)
    step = _softplus(tl.dot(dt, W, input_precision="ieee") + shift[None, :])
    at = delta + (d * M + m[:, None]) * E + e[None, :]
    tl.store(at, step.to(delta.dtype.element_ty), mask=(m < M)[:, None] & (e < E)[None, :])


def steps(dt: Tensor, weights: Tensor, biases: Sequence[Tensor]) -> Tensor:
    """delta (directions, tokens, E) in dt's dtype, of dt (directions, tokens, R) with unit stride along R, contiguous weights
    (directions, R, E) in the same dtype and biases (E,)."""
    directions, M, R = dt.shape
    E = weights.shape[2]
    delta = torch.empty((directions, M, E), dtype=dt.dtype, device=dt.device)
    if delta.numel():
        rank = max(16, triton.next_power_of_2(R))
        config = FULL if dt.dtype == torch.float32 else LOW
        grid = (triton.cdiv(M, config["TOKENS"]), triton.cdiv(E, config["CHANNELS"]), directions)
        with launching_on(dt.device):
            steps_kernel[grid](
                dt, weights, biases[0], biases[-1], delta, M, E, R, dt.stride(0), dt.stride(1), RANK=rank, **config
            )  # fmt: skip
    return delta
