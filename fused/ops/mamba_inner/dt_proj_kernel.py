"""dt_proj with its bias and softplus in Triton: the scan's step sizes, every direction in one launch.

    delta = softplus(dt W + bias)        dt (tokens, R), W (R, E)

The product and what follows are in float32, and delta is rounded once. So the scan, whose instructions are dearer, has no
softplus to make.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused.ops.selective_scan.schedule import multiprocessors
from fused.runtime.triton_launch import NATIVE, blocks, capability, launching_on, power_of_2

LOW = {"TOKENS": 64, "CHANNELS": 128, "num_warps": 4, "num_stages": 3}
TUNED = {90: {"maxnreg": 128}}  # by compute capability, for LOW: four programs at once, where that spills nothing
FULL = {"TOKENS": 16, "CHANNELS": 32, "num_warps": 4}  # float32 has no tensor cores: larger products do not fit
AT_ONCE = 4  # programs of a multiprocessor
LOST = 1  # what a program costs beside its tiles of tokens, in tiles


@triton.jit
def _exp2(x, NATIVE: tl.constexpr):
    if not NATIVE:
        return tl.exp2(x)
    return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _softplus(x, FINE: tl.constexpr, NATIVE: tl.constexpr):
    """max(x, 0) + log1p(w), w = exp(-|x|). Fine: log1p(w) = 2 artanh(w / (2 + w)) by a minimax polynomial, as in the scan.
    Else within 1e-5 of it, w times a minimax polynomial in w, with one visit to the special function unit instead of two."""
    if FINE:
        w = tl.exp(-tl.abs(x))
        s = w / (2.0 + w)
        q = s * s
        p = tl.fma(q, tl.fma(q, tl.fma(q, tl.full(q.shape, 0.28024462, tl.float32), 0.27999142), 0.40021700), 0.66666412)
        return tl.maximum(x, 0.0) + tl.fma(s * q, p, 2.0 * s)
    w = _exp2(tl.abs(x) * -1.4426950408889634, NATIVE)
    p = tl.fma(w, tl.fma(w, tl.full(w.shape, -0.023869152, tl.float32), 0.10122228), -0.21004869)
    p = tl.fma(w, tl.fma(w, tl.fma(w, p, 0.32520668), -0.49936137), 0.99999160)
    return tl.fma(w, p, tl.maximum(x, 0.0))


@triton.jit(do_not_specialize=["M", "tiles"])
def steps_kernel(
    rows, weight, bias0, bias1, delta, M, E, tiles, R: tl.constexpr, ROW: tl.constexpr, RANK: tl.constexpr,
    TOKENS: tl.constexpr, CHANNELS: tl.constexpr, FINE: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    d = tl.program_id(2).to(tl.int64)
    e, r = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS), tl.arange(0, RANK)
    known = (r < R)[:, None] & (e < E)[None, :]
    W = tl.load(weight + d * R * E + r[:, None] * E + e[None, :], mask=known, other=0.0)
    bias = bias0 if tl.program_id(2) == 0 else bias1
    shift = tl.load(bias + e, mask=e < E, other=0.0).to(tl.float32)
    for i in range(tiles):
        m = (tl.program_id(0).to(tl.int64) * tiles + i) * TOKENS + tl.arange(0, TOKENS)
        inside = (m < M)[:, None] & (r < R)[None, :]
        dt = tl.load(rows + (d * M + m[:, None]) * ROW + r[None, :], mask=inside, other=0.0)
        step = _softplus(tl.dot(dt, W, input_precision="ieee") + shift[None, :], FINE, NATIVE)
        at = delta + (d * M + m[:, None]) * E + e[None, :]
        tl.store(at, step.to(delta.dtype.element_ty), mask=(m < M)[:, None] & (e < E)[None, :])


def steps(rows: Tensor, weights: Tensor, biases: Sequence[Tensor]) -> Tensor:
    """delta (directions, tokens, E) in the dtype of contiguous rows (directions, tokens, R and more), whose first R columns are
    dt, contiguous weights (directions, R, E) in the same dtype and biases (E,)."""
    directions, M, row = rows.shape
    _, R, E = weights.shape
    delta = torch.empty((directions, M, E), dtype=rows.dtype, device=rows.device)
    if delta.numel():
        rank = max(16, power_of_2(R))
        fine = rows.dtype == torch.float32
        config = FULL if fine else LOW | TUNED.get(capability(rows.device), {})
        across = blocks(E, config["CHANNELS"])
        tiles = _tiles(blocks(M, config["TOKENS"]), across * directions, AT_ONCE * multiprocessors(rows.device))
        grid = (blocks(M, config["TOKENS"] * tiles), across, directions)
        with launching_on(rows.device):
            steps_kernel[grid](
                rows, weights, biases[0], biases[-1], delta, M, E, tiles, R, row, RANK=rank, FINE=fine, NATIVE=NATIVE, **config
            )  # fmt: skip
    return delta


@lru_cache(maxsize=1024)
def _tiles(count: int, beside: int, slots: int) -> int:
    """How many of `count` tiles of tokens a program takes, with `beside` programs for the same tokens: of all the fewest waves
    of programs times what one takes."""
    return min(range(1, min(count, 8) + 1), key=lambda n: blocks(blocks(count, n) * beside, slots) * (n + LOST))
