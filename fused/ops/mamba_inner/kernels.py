"""Triton kernels of a mixer other than convolution and scan, and their launches: dt_proj, weights, gate backward.

    delta = softplus(dt W + bias)        dt (tokens, R), W (R, E): the step sizes of the scan, all directions in one launch

Product and softplus are computed in float32 and delta is rounded once. Softplus is computed here and not in the scan, where an
instruction costs more time.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused.ops.mamba_inner.softplus_kernels import softplus
from fused.ops.mamba_inner.wide_dt_proj_kernels import WIDE_RANK, wide_dt_proj_softplus
from fused.ops.selective_scan.schedule import multiprocessors
from fused.runtime.triton_launch import FUSED_MULTIPLY_ADD, NATIVE, blocks, capability, launch, power_of_2

CHANNELS_PER_PROGRAM = 1024  # of pack_weights and silu_gate_backward
ELEMENTS_PER_PROGRAM = 1024  # of unpack_gradients
CONFIG_16_BIT = {"BLOCK_TOKENS": 64, "BLOCK_CHANNELS": 128, "num_warps": 4, "num_stages": 3, **FUSED_MULTIPLY_ADD}
# float32 products do not run on tensor cores, so that larger tiles do not fit in registers
CONFIG_FLOAT32 = {"BLOCK_TOKENS": 16, "BLOCK_CHANNELS": 32, "num_warps": 4, **FUSED_MULTIPLY_ADD}
# options for CONFIG_16_BIT by compute capability: 128 registers, with which four programs fit on an SM and nothing spills
CAPABILITY_OPTIONS = {90: {"maxnreg": 128}}
PROGRAMS_PER_SM = 4
PROGRAM_OVERHEAD_TILES = 1  # cost of a program apart from its tiles of tokens, in tiles


@triton.jit(do_not_specialize=["M", "tiles_per_program"])
def dt_proj_softplus_kernel(
    dt_B_C_ptr: tl.tensor, weight_ptr: tl.tensor, bias_0_ptr: tl.tensor, bias_1_ptr: tl.tensor, delta_ptr: tl.tensor,
    M: tl.tensor, E: tl.tensor, tiles_per_program: tl.tensor,
    R: tl.constexpr, ROW_STRIDE: tl.constexpr, BLOCK_RANK: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr, PRECISE: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """Compute delta (directions, M, E) from the first R columns of dt_B_C (directions, M, ROW_STRIDE).

    weight is (directions, R, E), the bias of each direction (E,). BLOCK_RANK is R padded to a size that tl.dot takes.
    """
    direction = tl.program_id(2).to(tl.int64)
    channels, ranks = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS), tl.arange(0, BLOCK_RANK)
    weight_mask = (ranks < R)[:, None] & (channels < E)[None, :]
    weight_ptrs = weight_ptr + direction * R * E + ranks[:, None] * E + channels[None, :]
    weight = tl.load(weight_ptrs, mask=weight_mask, other=0.0)
    bias_ptr = bias_0_ptr if tl.program_id(2) == 0 else bias_1_ptr
    bias = tl.load(bias_ptr + channels, mask=channels < E, other=0.0).to(tl.float32)
    for i in range(tiles_per_program):
        tokens = (tl.program_id(0).to(tl.int64) * tiles_per_program + i) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
        dt_mask = (tokens < M)[:, None] & (ranks < R)[None, :]
        dt = tl.load(dt_B_C_ptr + (direction * M + tokens[:, None]) * ROW_STRIDE + ranks[None, :], mask=dt_mask, other=0.0)
        delta = softplus(tl.dot(dt, weight, input_precision="ieee") + bias[None, :], PRECISE, NATIVE)
        delta_ptrs = delta_ptr + (direction * M + tokens[:, None]) * E + channels[None, :]
        tl.store(delta_ptrs, delta.to(delta_ptr.dtype.element_ty), mask=(tokens < M)[:, None] & (channels < E)[None, :])


def dt_proj_softplus(dt_B_C: Tensor, weights: Tensor, biases: Sequence[Tensor]) -> Tensor:
    """Return delta (directions, tokens, E) in the dtype of `dt_B_C`.

    dt_B_C (directions, tokens, at least R), whose first R columns are dt, and weights (directions, R, E) are contiguous and of
    one dtype. There is one bias (E,) for each direction.
    """
    directions, M, row_stride = dt_B_C.shape
    _, R, E = weights.shape
    delta = torch.empty((directions, M, E), dtype=dt_B_C.dtype, device=dt_B_C.device)
    if R > WIDE_RANK and delta.dtype != torch.float32 and delta.numel():
        wide_dt_proj_softplus(dt_B_C, weights, (biases[0], biases[-1]), delta)
    elif delta.numel():
        grid, tiles_per_program, config = _dt_proj_launch(directions, M, R, E, dt_B_C.dtype == torch.float32, dt_B_C.device)
        launch(
            dt_proj_softplus_kernel, dt_B_C.device, grid,
            dt_B_C, weights, biases[0], biases[-1], delta, M, E, tiles_per_program, R, row_stride, NATIVE=NATIVE, **config,
        )  # fmt: skip
    return delta


@lru_cache(maxsize=1024)
def _dt_proj_launch(
    directions: int, M: int, R: int, E: int, precise: bool, device: torch.device
) -> tuple[tuple[int, int, int], int, dict[str, Any]]:
    """Return the grid, the tiles of tokens of a program, and the kernel's constants and options."""
    config = CONFIG_FLOAT32 if precise else CONFIG_16_BIT | CAPABILITY_OPTIONS.get(capability(device), {})
    channel_blocks = blocks(E, config["BLOCK_CHANNELS"])
    resident_programs = PROGRAMS_PER_SM * multiprocessors(device)
    tiles = blocks(M, config["BLOCK_TOKENS"])
    tiles_per_program = _tiles_per_program(tiles, channel_blocks * directions, resident_programs)
    grid = (blocks(tiles, tiles_per_program), channel_blocks, directions)
    return grid, tiles_per_program, {"BLOCK_RANK": max(16, power_of_2(R)), "PRECISE": precise, **config}


def _tiles_per_program(tiles: int, programs_per_tile: int, resident_programs: int) -> int:
    """Return how many of all `tiles` of tokens a program takes, from 1 to 8.

    It is the number with the least cost: waves of programs, each of as many as the GPU holds at once, times the cost of one
    program.
    """

    def cost(n: int) -> int:
        return blocks(blocks(tiles, n) * programs_per_tile, resident_programs) * (n + PROGRAM_OVERHEAD_TILES)

    return min(range(1, min(tiles, 8) + 1), key=cost)


@triton.jit
def _copy_as_float32(
    src_0_ptr: tl.tensor, src_1_ptr: tl.tensor, src_offsets: tl.tensor, dst_ptrs: tl.tensor, direction: tl.tensor,
    mask: tl.tensor,
):  # fmt: skip
    """Copy from src_0 or src_1, by direction; they may differ in dtype, so that one pointer variable cannot hold either."""
    if direction == 0:
        tl.store(dst_ptrs, tl.load(src_0_ptr + src_offsets, mask=mask).to(tl.float32), mask=mask)
    else:
        tl.store(dst_ptrs, tl.load(src_1_ptr + src_offsets, mask=mask).to(tl.float32), mask=mask)


@triton.jit
def pack_weights_kernel(
    x_proj_0_ptr: tl.tensor, x_proj_1_ptr: tl.tensor, dt_proj_0_ptr: tl.tensor, dt_proj_1_ptr: tl.tensor,
    A_0_ptr: tl.tensor, A_1_ptr: tl.tensor, D_0_ptr: tl.tensor, D_1_ptr: tl.tensor,
    linear_0_ptr: tl.tensor, linear_1_ptr: tl.tensor, packed_ptr: tl.tensor, A_D_ptr: tl.tensor,
    E: tl.tensor, R: tl.tensor, N: tl.tensor, padded_R: tl.tensor, x_proj_rows: tl.tensor, directions: tl.tensor,
    linear_0_rows: tl.tensor, direction_rows: tl.tensor, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """Write one row of E channels: of x_proj, then of dt_proj transposed, then of A and D in float32 unless A_D is None.

    These are `direction_rows` rows for each direction. The rows behind them, of the first direction, copy two other matrices.
    packed is (directions x_proj_rows + directions padded_R + rows of the others, E), x_proj of all directions before dt_proj of
    all. A_D is (directions, (N + 1) E): A (E, N) as it is, then D.
    """
    row, direction = tl.program_id(0), tl.program_id(2)
    channels = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    inside = channels < E
    if row < x_proj_rows:
        x_proj_ptr = x_proj_0_ptr if direction == 0 else x_proj_1_ptr
        source_row = tl.where(row < R, row, row - (padded_R - R))
        rows = tl.broadcast_to(row, channels.shape)  # Triton 3.9's interpreter takes no scalar into a mask
        is_weight = inside & ((rows < R) | (rows >= padded_R))
        values = tl.load(x_proj_ptr + source_row * E + channels, mask=is_weight, other=0.0)
        tl.store(packed_ptr + (direction * x_proj_rows + row) * E + channels, values, mask=inside)
    elif row < x_proj_rows + padded_R:
        dt_proj_ptr, rank = (dt_proj_0_ptr if direction == 0 else dt_proj_1_ptr), row - x_proj_rows
        is_weight = inside & (tl.broadcast_to(rank, channels.shape) < R)
        values = tl.load(dt_proj_ptr + channels * R + rank, mask=is_weight, other=0.0)
        tl.store(packed_ptr + (directions * x_proj_rows + direction * padded_R + rank) * E + channels, values, mask=inside)
    elif row >= direction_rows:
        if direction == 0:
            row -= direction_rows
            packed_ptr += (directions * (x_proj_rows + padded_R) + row) * E
            if row < linear_0_rows:
                if linear_0_ptr is not None:
                    tl.store(packed_ptr + channels, tl.load(linear_0_ptr + row * E + channels, mask=inside), mask=inside)
            elif linear_1_ptr is not None:
                row -= linear_0_rows
                tl.store(packed_ptr + channels, tl.load(linear_1_ptr + row * E + channels, mask=inside), mask=inside)
    elif A_D_ptr is not None:
        n = row - x_proj_rows - padded_R
        A_D_ptrs = A_D_ptr + (direction * (N + 1) + n) * E + channels
        if n < N:
            _copy_as_float32(A_0_ptr, A_1_ptr, n * E + channels, A_D_ptrs, direction, inside)
        else:
            _copy_as_float32(D_0_ptr, D_1_ptr, channels, A_D_ptrs, direction, inside)


class PackedWeights(NamedTuple):
    """The weights of all directions: matrices in the dtype of matrix products, A and D in float32."""

    x_proj: Tensor  # (directions, padded R + 2N, E): zero rows after the R of dt
    dt_proj: Tensor  # (directions, padded R, E)
    A: Sequence[Tensor]  # (E, N)
    D: Sequence[Tensor]  # (E,)
    linears: Sequence[Tensor]  # other matrices
    packed: Tensor  # the memory of all matrices that were packed, and of A and D where these are copies
    A_D: Tensor | None

    def last(self, count: int) -> "PackedWeights":
        """Return the weights of the last `count` directions."""
        return self._replace(x_proj=self.x_proj[-count:], dt_proj=self.dt_proj[-count:], A=self.A[-count:], D=self.D[-count:])


def pack_weights(
    x_proj: Sequence[Tensor], dt_proj: Sequence[Tensor], A: Sequence[Tensor], D: Sequence[Tensor], padded_R: int,
    dtype: torch.dtype, linears: Sequence[Tensor] = (), packed: Tensor | None = None, A_D: Tensor | None = None,
) -> PackedWeights:  # fmt: skip
    """Return x_proj (R + 2N, E) with rows of zeros from R to `padded_R`, and dt_proj (E, R) transposed, both in `dtype`.

    Each sequence has one or two contiguous weights, one for each direction. Those of x_proj have one dtype, those of dt_proj
    too. A (E, N) and D (E,) are returned unchanged if all are float32, otherwise as float32 copies. `linears` are up to two
    other contiguous matrices of a multiple of E elements, of which those of another dtype are cast. It is one launch, and none
    where `packed` and `A_D` of an earlier result for the same weights are given.
    """
    directions, (E, R), N, device = len(x_proj), dt_proj[0].shape, A[0].shape[1], x_proj[0].device
    x_proj_rows, cast = x_proj[0].shape[0] - R + padded_R, [w for w in linears if w.dtype != dtype]
    linear_rows, copies_A_D = [w.numel() // E for w in cast], any(x.dtype != torch.float32 for x in (*A, *D))
    if packed is None:
        packed = torch.empty((directions * (x_proj_rows + padded_R) + sum(linear_rows), E), dtype=dtype, device=device)
        A_D = torch.empty((directions, (N + 1) * E), dtype=torch.float32, device=device) if copies_A_D else None
        direction_rows = x_proj_rows + padded_R + (N + 1 if copies_A_D else 0)
        launch(
            pack_weights_kernel, device, (direction_rows + sum(linear_rows), blocks(E, CHANNELS_PER_PROGRAM), directions),
            x_proj[0], x_proj[-1], dt_proj[0], dt_proj[-1], A[0], A[-1], D[0], D[-1], *(*cast, None, None)[:2], packed, A_D,
            E, R, N, padded_R, x_proj_rows, directions, (*linear_rows, 0)[0], direction_rows,
            BLOCK_CHANNELS=CHANNELS_PER_PROGRAM, **FUSED_MULTIPLY_ADD,
        )  # fmt: skip
    if A_D is not None:
        all_A, all_D = A_D.split((N * E, E), dim=1)
        A, D = all_A.unflatten(1, (E, N)).unbind(), all_D.unbind()
    all_x_proj, all_dt_proj, *others = packed.split((directions * x_proj_rows, directions * padded_R, *linear_rows))
    views = iter(other.view(w.shape) for other, w in zip(others, cast, strict=True))
    all_linears = [w if w.dtype == dtype else next(views) for w in linears]
    all_x_proj, all_dt_proj = (x.unflatten(0, (directions, -1)) for x in (all_x_proj, all_dt_proj))
    return PackedWeights(all_x_proj, all_dt_proj, A, D, all_linears, packed, A_D)


@triton.jit
def unpack_gradients_kernel(
    d_x_proj_0_ptr: tl.tensor, d_x_proj_1_ptr: tl.tensor, d_dt_proj_0_ptr: tl.tensor, d_dt_proj_1_ptr: tl.tensor,
    out_x_proj_0_ptr: tl.tensor, out_x_proj_1_ptr: tl.tensor, out_dt_proj_0_ptr: tl.tensor, out_dt_proj_1_ptr: tl.tensor,
    x_proj_size: tl.tensor, dt_proj_size: tl.tensor, E: tl.tensor, R: tl.tensor, padded_R: tl.tensor,
    BLOCK_ELEMENTS: tl.constexpr,
):  # fmt: skip
    """Copy x_proj's gradient (padded R + 2N, E) and dt_proj's (E, padded R) without the rows and columns of the padding."""
    second = tl.program_id(1) == 1
    i = tl.program_id(0) * BLOCK_ELEMENTS + tl.arange(0, BLOCK_ELEMENTS)
    source = d_x_proj_1_ptr if second else d_x_proj_0_ptr
    out = out_x_proj_1_ptr if second else out_x_proj_0_ptr
    values = tl.load(source + i + tl.where(i < R * E, 0, (padded_R - R) * E), mask=i < x_proj_size)
    tl.store(out + i, values.to(out.dtype.element_ty), mask=i < x_proj_size)
    source = d_dt_proj_1_ptr if second else d_dt_proj_0_ptr
    out = out_dt_proj_1_ptr if second else out_dt_proj_0_ptr
    values = tl.load(source + i // R * padded_R + i % R, mask=i < dt_proj_size)
    tl.store(out + i, values.to(out.dtype.element_ty), mask=i < dt_proj_size)


def unpack_gradients(
    d_x_proj: list[Tensor], d_dt_proj: list[Tensor], x_proj: Sequence[Tensor], dt_proj: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the gradients of x_proj (R + 2N, E) and dt_proj (E, R), in the weights' dtypes, of one or two directions.

    They are given as those of the packed weights: d_x_proj (padded R + 2N, E) and d_dt_proj (E, padded R), contiguous. Where
    the weights of two directions differ in dtype, both gradients have that of the first.
    """
    (E, R), padded_R = dt_proj[0].shape, d_dt_proj[0].shape[1]
    same = d_x_proj[0].dtype == x_proj[0].dtype and d_dt_proj[0].dtype == dt_proj[0].dtype
    if R == padded_R and same and not d_x_proj[0]._is_view():  # results of an operator share no memory
        return d_x_proj, d_dt_proj
    out_x_proj, out_dt_proj = (
        [torch.empty(w.shape, dtype=weights[0].dtype, device=w.device) for w in weights] for weights in (x_proj, dt_proj)
    )
    x_proj_size, dt_proj_size = out_x_proj[0].numel(), out_dt_proj[0].numel()
    launch(
        unpack_gradients_kernel, x_proj[0].device, (blocks(max(x_proj_size, dt_proj_size), ELEMENTS_PER_PROGRAM), len(x_proj)),
        d_x_proj[0], d_x_proj[-1], d_dt_proj[0], d_dt_proj[-1], out_x_proj[0], out_x_proj[-1], out_dt_proj[0], out_dt_proj[-1],
        x_proj_size, dt_proj_size, E, R, padded_R, BLOCK_ELEMENTS=ELEMENTS_PER_PROGRAM, **FUSED_MULTIPLY_ADD,
    )  # fmt: skip
    return out_x_proj, out_dt_proj


@triton.jit(do_not_specialize=["L", "E"])
def silu_gate_backward_kernel(
    dy_ptr: tl.tensor, z_ptr: tl.tensor, out_ptr: tl.tensor, L: tl.tensor, E: tl.tensor,
    dy_clip_stride: tl.tensor, dy_token_stride: tl.tensor, z_clip_stride: tl.tensor, z_token_stride: tl.tensor,
    BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """Write one token of out (B, L, E) = dy silu(z), computed in float32."""
    token = tl.program_id(0).to(tl.int64)
    channels = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    clip, t, inside = token // L, token % L, channels < E
    z = tl.load(z_ptr + clip * z_clip_stride + t * z_token_stride + channels, mask=inside).to(tl.float32)
    dy = tl.load(dy_ptr + clip * dy_clip_stride + t * dy_token_stride + channels, mask=inside).to(tl.float32)
    tl.store(out_ptr + token * E + channels, (dy * z / (1.0 + tl.exp(-z))).to(out_ptr.dtype.element_ty), mask=inside)


def silu_gate_backward(dy: Tensor, z: Tensor) -> Tensor:
    """Return dy * silu(z), both (B, L, E) with unit stride along E, computed in float32 and rounded once to dy's dtype.

    It is the gradient of y in y * silu(z).
    """
    B, L, E = dy.shape
    out = torch.empty((B, L, E), dtype=dy.dtype, device=dy.device)
    if out.numel():
        launch(
            silu_gate_backward_kernel, dy.device, (B * L, blocks(E, CHANNELS_PER_PROGRAM)),
            dy, z, out, L, E, dy.stride(0), dy.stride(1), z.stride(0), z.stride(1),
            BLOCK_CHANNELS=CHANNELS_PER_PROGRAM, **FUSED_MULTIPLY_ADD,
        )  # fmt: skip
    return out
