"""Launches of the norm's kernels, without autograd."""

from functools import cache

import torch
from torch import Tensor

from fused.ops.add_norm.kernels import backward_kernel, forward_kernel, reduce_kernel
from fused.runtime.triton_launch import FUSED_MULTIPLY_ADD, blocks, launch, power_of_2

MAX_WIDTH = 8192  # the widest row that both kernels hold without spilling
PROGRAMS = 528  # of the backward: 4 for each of an H200's 132 SMs; constant, because it decides the order of sums
REDUCE = {"BLOCK_ROWS": 64, "BLOCK_COLUMNS": 32, "num_warps": 4, **FUSED_MULTIPLY_ADD}


def forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    centre: bool,
    residual_dtype: torch.dtype | None,
    out: Tensor | None = None,
    dtype: torch.dtype | None = None,
    kept: Tensor | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """Return y, v, the rows' means and their reciprocal standard deviations.

    y is in `dtype` or else in x's; v is in `residual_dtype`, or None without one; the means are None unless `centre`. x and
    residual are (..., D) with any strides; strides that the kernel cannot read cost a copy. v is written into a contiguous
    `out` where that is given; it may be residual itself, of which a row is read before it is written. With `kept` (B,) float32,
    stochastic depth, x (B, ..., D) is multiplied by scale times the number of its clip.
    """
    D = x.shape[-1]
    M = x.numel() // D if D else 0
    y = torch.empty(x.shape, dtype=dtype or x.dtype, device=x.device)
    if out is None and residual_dtype is not None:
        out = torch.empty(x.shape, dtype=residual_dtype, device=x.device)
    rstd = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    mean = torch.empty_like(rstd) if centre else None
    if M:
        config = tile_of_rows(D, 64 // x.element_size(), 4)
        (x_rows, x_row_stride), (residual_rows, residual_row_stride) = _readable_rows(x, D), _readable_rows(residual, D)
        launch(
            forward_kernel, x.device, (blocks(M, config["BLOCK_ROWS"]),),
            x_rows, kept, residual_rows, weight.contiguous(), None if bias is None else bias.contiguous(), y, out, mean, rstd,
            M, D, x_row_stride, residual_row_stride, M // len(x), scale, eps, **config,
        )  # fmt: skip
    return y, out, mean, rstd


def backward(
    dy: Tensor,
    dout: Tensor | None,
    v_or_x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    x_dtype: torch.dtype,
    residual_dtype: torch.dtype | None = None,
    dx: Tensor | None = None,
    kept: Tensor | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """Return (dx, dresidual, dweight, dbias) of `forward`, where v is v_or_x, or the sum of v_or_x and residual.

    mean and rstd are (...,), parameters (D,), the others (..., D). dx has `x_dtype`, or is the contiguous argument. dresidual
    has `residual_dtype`: None if that is None, dx itself if the two are equal and there is no `kept`. dweight and dbias have
    their parameter's dtype.
    """
    D = v_or_x.shape[-1]
    M = v_or_x.numel() // D if D else 0
    dx = torch.empty(v_or_x.shape, dtype=x_dtype, device=v_or_x.device) if dx is None else dx
    dresidual = dx if residual_dtype == x_dtype and kept is None else None
    if residual_dtype is not None and dresidual is None:
        dresidual = torch.empty(v_or_x.shape, dtype=residual_dtype, device=v_or_x.device)
    dweight = torch.empty(D, dtype=weight.dtype, device=v_or_x.device)
    dbias = None if bias is None else torch.empty(D, dtype=bias.dtype, device=v_or_x.device)
    if not M:
        return dx, dresidual, dweight.zero_(), None if dbias is None else dbias.zero_()
    (dy, dout, rows, residual_rows), strides = zip(*(_readable_rows(t, D) for t in (dy, dout, v_or_x, residual)), strict=True)
    config = tile_of_rows(D, 8, 8)
    tiles = blocks(M, config["BLOCK_ROWS"])
    tiles_per_program = blocks(tiles, PROGRAMS)
    programs = blocks(tiles, tiles_per_program)
    partial = torch.empty((1 if bias is None else 2, programs, D), dtype=torch.float32, device=v_or_x.device)
    dweights, dbiases = partial[0], None if bias is None else partial[1]
    launch(
        backward_kernel, v_or_x.device, (programs,),
        dy, dout, rows, kept, residual_rows, weight.contiguous(), mean, rstd, dx, None if dresidual is dx else dresidual,
        dweights, dbiases, M, D, *strides, M // len(v_or_x), scale, tiles_per_program, X_IS_V=residual is None, **config,
    )  # fmt: skip
    grid = blocks(D, REDUCE["BLOCK_COLUMNS"]), len(partial)
    launch(reduce_kernel, v_or_x.device, grid, dweights, dbiases, dweight, dbias, programs, D, **REDUCE)
    return dx, dresidual, dweight, dbias


@cache
def tile_of_rows(D: int, elements_per_thread: int, warps: int) -> dict[str, int]:
    """Return the shape of a tile with about that many elements per thread; `warps` is a minimum, wide rows take more."""
    columns = power_of_2(D)
    warps = min(max(columns // (32 * elements_per_thread), warps), 16)
    rows = min(max(32 * warps * elements_per_thread // columns, 1), 16)
    return {"BLOCK_ROWS": rows, "BLOCK_COLUMNS": columns, "num_warps": warps, **FUSED_MULTIPLY_ADD}


def _readable_rows(x: Tensor | None, D: int) -> tuple[Tensor | None, int]:
    """Return x (..., D) and the stride of its rows, (None, 0) for None.

    x is copied where its strides or address would make the compiler sum a row in another order than in a fresh tensor.
    """
    if x is None:
        return None, 0
    if x.is_contiguous():
        return (x, D) if D % 16 or x.data_ptr() % 16 == 0 else (x.clone(), D)
    rows = x.reshape(-1, D)
    if D % 16 or rows.stride(0) % 16 or rows.stride(1) != 1 or rows.data_ptr() % 16:
        return rows.clone(memory_format=torch.contiguous_format), D
    return rows, rows.stride(0)
