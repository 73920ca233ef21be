"""The kernels of a mixer beside convolution and scan, in Triton, with their launches: dt_proj, packing of weights, the gate.

    delta = softplus(dt W + bias)        dt (tokens, R), W (R, E): the scan's step sizes, every direction in one launch

The product and softplus are in float32, and delta is rounded once. So the scan, whose instructions are dearer, has no softplus
to make.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused.ops.selective_scan.schedule import multiprocessors
from fused.runtime.triton_launch import NATIVE, blocks, capability, launching_on, power_of_2

CHANNELS_PER_PROGRAM = 1024  # in packing and the gate
CONFIG_16_BIT = {"TOKENS": 64, "CHANNELS": 128, "num_warps": 4, "num_stages": 3}
TUNED = {90: {"maxnreg": 128}}  # by compute capability, for CONFIG_16_BIT: four programs at once, where that spills nothing
CONFIG_FLOAT32 = {"TOKENS": 16, "CHANNELS": 32, "num_warps": 4}  # float32 has no tensor cores: larger products do not fit
PROGRAMS_PER_SM = 4
PROGRAM_COST = 1  # of a program beside its tiles of tokens, in tiles


@triton.jit
def _exp2(x, NATIVE: tl.constexpr):
    if not NATIVE:
        return tl.exp2(x)
    return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _softplus(x, PRECISE: tl.constexpr, NATIVE: tl.constexpr):
    """max(x, 0) + log1p(w), w = exp(-|x|). Precise: log1p(w) = 2 artanh(w / (2 + w)) by a minimax polynomial, as in the scan.
    Else within 1e-5 of it, w times a minimax polynomial in w, with one visit to the special function unit instead of two."""
    if PRECISE:
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
def dt_proj_softplus_kernel(
    dt_B_C, weight, bias0, bias1, delta, M, E, tiles, R: tl.constexpr, ROW: tl.constexpr, RANK: tl.constexpr,
    TOKENS: tl.constexpr, CHANNELS: tl.constexpr, PRECISE: tl.constexpr, NATIVE: tl.constexpr,
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
        dt = tl.load(dt_B_C + (d * M + m[:, None]) * ROW + r[None, :], mask=inside, other=0.0)
        step = _softplus(tl.dot(dt, W, input_precision="ieee") + shift[None, :], PRECISE, NATIVE)
        pointers = delta + (d * M + m[:, None]) * E + e[None, :]
        tl.store(pointers, step.to(delta.dtype.element_ty), mask=(m < M)[:, None] & (e < E)[None, :])


def dt_proj_softplus(dt_B_C: Tensor, weights: Tensor, biases: Sequence[Tensor]) -> Tensor:
    """Return delta (directions, tokens, E) in the dtype of `dt_B_C`.

    dt_B_C (directions, tokens, R and more), whose first R columns are dt, and weights (directions, R, E) are contiguous and of
    one dtype; biases are (E,).
    """
    directions, M, row = dt_B_C.shape
    _, R, E = weights.shape
    delta = torch.empty((directions, M, E), dtype=dt_B_C.dtype, device=dt_B_C.device)
    if delta.numel():
        grid, options = _dt_proj_launch(directions, M, R, E, dt_B_C.dtype == torch.float32, dt_B_C.device)
        with launching_on(dt_B_C.device):
            dt_proj_softplus_kernel[grid](
                dt_B_C, weights, biases[0], biases[-1], delta, M, E, options["tiles"], R, row, NATIVE=NATIVE,
                **options["constants"],
            )  # fmt: skip
    return delta


@lru_cache(maxsize=1024)
def _dt_proj_launch(
    directions: int, M: int, R: int, E: int, precise: bool, device: torch.device
) -> tuple[tuple[int, int, int], dict[str, Any]]:
    """Return the grid, and the tiles of a program with the kernel's constants."""
    config = CONFIG_FLOAT32 if precise else CONFIG_16_BIT | TUNED.get(capability(device), {})
    across = blocks(E, config["CHANNELS"])
    slots = PROGRAMS_PER_SM * multiprocessors(device)
    tiles = _tiles_per_program(blocks(M, config["TOKENS"]), across * directions, slots)
    grid = (blocks(M, config["TOKENS"] * tiles), across, directions)
    return grid, {"tiles": tiles, "constants": {"RANK": max(16, power_of_2(R)), "PRECISE": precise, **config}}


def _tiles_per_program(count: int, beside: int, slots: int) -> int:
    """Return how many of `count` tiles of tokens a program takes, with `beside` programs for the same tokens.

    It is the number with the fewest waves of programs times the cost of one program.
    """
    return min(range(1, min(count, 8) + 1), key=lambda n: blocks(blocks(count, n) * beside, slots) * (n + PROGRAM_COST))


@triton.jit
def _widen(first, second, at, to, d, inside):
    """Pointers of two dtypes cannot be one or the other; what is loaded through them can."""
    if d == 0:
        tl.store(to, tl.load(first + at, mask=inside).to(tl.float32), mask=inside)
    else:
        tl.store(to, tl.load(second + at, mask=inside).to(tl.float32), mask=inside)


@triton.jit
def pack_weights_kernel(
    proj0, proj1, dt0, dt1, A0, A1, D0, D1, out, wide, E, R, N, PADDED_R, WIDTH, DIRECTIONS, BLOCK: tl.constexpr
):  # fmt: skip
    row, d = tl.program_id(0), tl.program_id(2)
    e = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = e < E
    if row < WIDTH:
        proj = proj0 if d == 0 else proj1
        own = tl.where(row < R, row, row - (PADDED_R - R))
        x = tl.load(proj + own * E + e, mask=inside & ((row < R) | (row >= PADDED_R)), other=0.0)
        tl.store(out + (d * WIDTH + row) * E + e, x, mask=inside)
    elif row < WIDTH + PADDED_R:
        dt, r = (dt0 if d == 0 else dt1), row - WIDTH
        x = tl.load(dt + e * R + r, mask=inside & (r < R), other=0.0)
        tl.store(out + (DIRECTIONS * WIDTH + d * PADDED_R + r) * E + e, x, mask=inside)
    elif wide is not None:
        n = row - WIDTH - PADDED_R
        at = wide + (d * (N + 1) + n) * E + e
        if n < N:
            _widen(A0, A1, n * E + e, at, d, inside)
        else:
            _widen(D0, D1, e, at, d, inside)


class PackedWeights(NamedTuple):
    """Weights of every direction. Matrices have the dtype of matrix products, A and D float32."""

    x_proj: Tensor  # (directions, padded R + 2N, E): rows of zeros behind the R of dt
    dt_proj: Tensor  # (directions, padded R, E)
    A: Sequence[Tensor]  # (E, N)
    D: Sequence[Tensor]  # (E,)

    def last(self, count: int) -> "PackedWeights":
        """Return those of the last `count` directions."""
        return PackedWeights(self.x_proj[-count:], self.dt_proj[-count:], self.A[-count:], self.D[-count:])


def pack_weights(
    x_proj: Sequence[Tensor], dt_proj: Sequence[Tensor], A: Sequence[Tensor], D: Sequence[Tensor], padded_R: int
) -> PackedWeights:
    """Return x_proj (R + 2N, E) with rows of zeros between R and `padded_R`, and dt_proj (E, R) transposed, in one launch.

    Weights are contiguous, one or two each. A (E, N) and D (E,) are returned as they are where all of them are float32.
    """
    count, (E, R), N = len(x_proj), dt_proj[0].shape, A[0].shape[1]
    width = x_proj[0].shape[0] - R + padded_R
    out = torch.empty((count * (width + padded_R), E), dtype=x_proj[0].dtype, device=x_proj[0].device)
    wide = None
    if not A[0].dtype == A[-1].dtype == D[0].dtype == D[-1].dtype == torch.float32:
        wide = torch.empty((count, (N + 1) * E), dtype=torch.float32, device=out.device)
    rows = width + padded_R + (0 if wide is None else N + 1)
    with launching_on(out.device):
        pack_weights_kernel[rows, blocks(E, CHANNELS_PER_PROGRAM), count](
            x_proj[0], x_proj[-1], dt_proj[0], dt_proj[-1], A[0], A[-1], D[0], D[-1],
            out, wide, E, R, N, padded_R, width, count, BLOCK=CHANNELS_PER_PROGRAM,
        )  # fmt: skip
    if wide is not None:
        both = wide.split((N * E, E), dim=1)
        A, D = both[0].unflatten(1, (E, N)).unbind(), both[1].unbind()
    products = out.split((count * width, count * padded_R))
    return PackedWeights(products[0].unflatten(0, (count, width)), products[1].unflatten(0, (count, padded_R)), A, D)


@triton.jit(do_not_specialize=["L", "E"])
def silu_gate_backward_kernel(dy, z, out, L, E, dy_clip, dy_token, z_clip, z_token, BLOCK: tl.constexpr):
    token, e = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    clip, t, inside = token // L, token % L, e < E
    g = tl.load(z + clip * z_clip + t * z_token + e, mask=inside).to(tl.float32)
    d = tl.load(dy + clip * dy_clip + t * dy_token + e, mask=inside).to(tl.float32)
    tl.store(out + token * E + e, (d * g / (1.0 + tl.exp(-g))).to(out.dtype.element_ty), mask=inside)


def silu_gate_backward(dy: Tensor, z: Tensor) -> Tensor:
    """Return dy * silu(z), both (B, L, E) with unit stride along E, computed in float32 and rounded once to dy's dtype.

    It is the gradient of y in y * silu(z).
    """
    B, L, E = dy.shape
    out = torch.empty((B, L, E), dtype=dy.dtype, device=dy.device)
    if out.numel():
        with launching_on(dy.device):
            silu_gate_backward_kernel[(B * L, blocks(E, CHANNELS_PER_PROGRAM))](
                dy, z, out, L, E, dy.stride(0), dy.stride(1), z.stride(0), z.stride(1), BLOCK=CHANNELS_PER_PROGRAM
            )  # fmt: skip
    return out
