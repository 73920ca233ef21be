"""Add and normalise in Triton: a row in registers, one pass over memory each way.

    v    = x + residual                     u = (v - mean) rstd        (rms: mean is 0)
    y    = u weight + bias                  rstd = 1 / sqrt(mean((v - mean)^2) + eps)
    w    = dy weight
    dv   = (w - u mean(w u) - mean(w)) rstd + dout                     (rms: without mean(w))
    dweight = sum over rows of dy u         dbias = sum over rows of dy

All in float32, whatever comes. How a row is summed depends on D and the dtypes alone, so a row's bits do not depend on
the other rows; dweight and dbias are summed by programs, each over its own rows in order, then over the programs in
order, and which rows are whose depends on the number of rows alone.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused.runtime.triton_launch import blocks, launching_on, power_of_2

MAX_WIDTH = 8192  # the widest row that both kernels hold without spilling
PROGRAMS = 528  # of the backward: 4 for each of an H200's 132 SMs; a constant, for it decides the order of sums
REDUCE = {"ROWS": 64, "COLUMNS": 32, "num_warps": 4}


@triton.jit
def _load(pointer, rows, columns, M, D, stride):
    """(ROWS, COLUMNS) of a matrix in float32, zero outside it; the cache is for what is read again sooner."""
    inside = (rows < M)[:, None] & (columns < D)[None, :]
    at = pointer + rows.to(tl.int64)[:, None] * stride + columns[None, :]
    return tl.load(at, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)


@triton.jit
def _store(pointer, value, rows, columns, M, D, LATE: tl.constexpr = False):
    inside = (rows < M)[:, None] & (columns < D)[None, :]
    at = rows.to(tl.int64)[:, None] * D + columns[None, :]
    tl.store(pointer + at, value.to(pointer.dtype.element_ty), mask=inside, cache_modifier=".cs" if LATE else "")


@triton.jit(do_not_specialize=["M"])
def forward_kernel(
    x, residual, weight, bias, y, out, mean, rstd, M, D, x_row, residual_row, eps,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    v = _load(x, rows, columns, M, D, x_row)
    if residual is not None:
        v += _load(residual, rows, columns, M, D, residual_row)
    if out is not None:
        _store(out, v, rows, columns, M, D, LATE=True)  # read by the next norm, behind all of a mixer
    if mean is not None:
        centre = tl.sum(v, axis=1) / D
        tl.store(mean + rows, centre, mask=rows < M)
        v = tl.where((columns < D)[None, :], v - centre[:, None], 0.0)
    scale = tl.rsqrt(tl.sum(v * v, axis=1) / D + eps)
    tl.store(rstd + rows, scale, mask=rows < M)
    result = v * scale[:, None] * tl.load(weight + columns, mask=columns < D, other=0.0).to(tl.float32)[None, :]
    if bias is not None:
        result += tl.load(bias + columns, mask=columns < D, other=0.0).to(tl.float32)[None, :]
    _store(y, result, rows, columns, M, D)


@triton.jit(do_not_specialize=["M", "rounds"])
def backward_kernel(
    dy, dout, first, second, weight, mean, rstd, dx, dresidual, dweights, dbiases,
    M, D, dy_row, dout_row, first_row, second_row, rounds,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """v = first + second; dweights and dbiases are (programs, D), one row for each program."""
    columns = tl.arange(0, COLUMNS)
    w = tl.load(weight + columns, mask=columns < D, other=0.0).to(tl.float32)[None, :]
    sum_weight = tl.zeros((ROWS, COLUMNS), tl.float32)
    if dbiases is not None:
        sum_bias = tl.zeros((ROWS, COLUMNS), tl.float32)
    for i in range(rounds):
        rows = (tl.program_id(0) * rounds + i) * ROWS + tl.arange(0, ROWS)
        g = _load(dy, rows, columns, M, D, dy_row)
        u = _load(first, rows, columns, M, D, first_row)
        if second is not None:
            u += _load(second, rows, columns, M, D, second_row)
        if mean is not None:
            centre = tl.load(mean + rows, mask=rows < M, other=0.0)
            u = tl.where((columns < D)[None, :], u - centre[:, None], 0.0)
        scale = tl.load(rstd + rows, mask=rows < M, other=0.0)[:, None]
        u *= scale
        sum_weight += g * u
        if dbiases is not None:
            sum_bias += g
        g *= w
        dv = g - u * (tl.sum(g * u, axis=1) / D)[:, None]
        if mean is not None:
            dv -= (tl.sum(g, axis=1) / D)[:, None]
        dv *= scale
        if dout is not None:
            dv += _load(dout, rows, columns, M, D, dout_row)
        _store(dx, dv, rows, columns, M, D)
        if dresidual is not None:
            _store(dresidual, dv, rows, columns, M, D)
    at = tl.program_id(0).to(tl.int64) * D + columns
    tl.store(dweights + at, tl.sum(sum_weight, axis=0), mask=columns < D)
    if dbiases is not None:
        tl.store(dbiases + at, tl.sum(sum_bias, axis=0), mask=columns < D)


@triton.jit(do_not_specialize=["programs"])
def reduce_kernel(dweights, dbiases, dweight, dbias, programs, D, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Sum (programs, D) over the programs: of dweights, and in the second row of the grid of dbiases."""
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for i in range(0, programs, ROWS):
        rows = i + tl.arange(0, ROWS)
        if tl.program_id(1) == 0:
            total += _load(dweights, rows, columns, programs, D, D)
        elif dbiases is not None:
            total += _load(dbiases, rows, columns, programs, D, D)
    result = tl.sum(total, axis=0)
    if tl.program_id(1) == 0:
        tl.store(dweight + columns, result.to(dweight.dtype.element_ty), mask=columns < D)
    elif dbiases is not None:
        tl.store(dbias + columns, result.to(dbias.dtype.element_ty), mask=columns < D)


def forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    centre: bool,
    stored: torch.dtype | None,
    out: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """y in `dtype` or else in x's, v in `stored` unless that is None, the rows' means if `centre`, their rstd.

    x and residual are (..., D) with any strides; what the kernel does not read in place costs a copy. v is written into a
    contiguous `out` if that is given; it may be residual itself, of which a row is read before it is written.
    """
    D = x.shape[-1]
    M = x.numel() // D if D else 0
    y = torch.empty(x.shape, dtype=dtype or x.dtype, device=x.device)
    if out is None and stored is not None:
        out = torch.empty(x.shape, dtype=stored, device=x.device)
    rstd = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    mean = torch.empty_like(rstd) if centre else None
    if M:
        config = _tile(D, 64 // x.element_size(), 4)
        (first, x_row), (second, residual_row) = _rows(x, D), _rows(residual, D)
        with launching_on(x.device):
            forward_kernel[(blocks(M, config["ROWS"]),)](
                first, second, weight.contiguous(), None if bias is None else bias.contiguous(), y, out, mean, rstd,
                M, D, x_row, residual_row, eps, **config,
            )  # fmt: skip
    return y, out, mean, rstd


def backward(
    dy: Tensor,
    dout: Tensor | None,
    first: Tensor,
    second: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    x_dtype: torch.dtype,
    residual_dtype: torch.dtype | None = None,
    dx: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """(dx, dresidual, dweight, dbias) of `forward`, from v or from x and residual as `first` and `second`.

    All but the parameters and what has one number a row are (..., D). dx has `x_dtype`, or is given, contiguous. dresidual
    has `residual_dtype`: None if that is None, dx itself if the two are equal. dweight and dbias have the dtype of weight
    and bias.
    """
    D = first.shape[-1]
    M = first.numel() // D if D else 0
    dx = torch.empty(first.shape, dtype=x_dtype, device=first.device) if dx is None else dx
    dresidual = dx if residual_dtype == x_dtype else None
    if residual_dtype is not None and dresidual is None:
        dresidual = torch.empty(first.shape, dtype=residual_dtype, device=first.device)
    dweight = torch.empty(D, dtype=weight.dtype, device=first.device)
    dbias = None if bias is None else torch.empty(D, dtype=bias.dtype, device=first.device)
    if not M:
        return dx, dresidual, dweight.zero_(), None if dbias is None else dbias.zero_()
    read, strides = zip(*(_rows(t, D) for t in (dy, dout, first, second)), strict=True)
    config = _tile(D, 8, 8)
    tiles = blocks(M, config["ROWS"])
    rounds = blocks(tiles, PROGRAMS)
    programs = blocks(tiles, rounds)
    partial = torch.empty((1 if bias is None else 2, programs, D), dtype=torch.float32, device=first.device)
    dweights, dbiases = partial[0], None if bias is None else partial[1]
    with launching_on(first.device):
        backward_kernel[(programs,)](
            *read, weight.contiguous(), mean, rstd, dx, None if dresidual is dx else dresidual,
            dweights, dbiases, M, D, *strides, rounds, **config,
        )  # fmt: skip
        reduce_kernel[(blocks(D, REDUCE["COLUMNS"]), len(partial))](dweights, dbiases, dweight, dbias, programs, D, **REDUCE)
    return dx, dresidual, dweight, dbias


@cache
def _tile(D: int, numbers: int, warps: int) -> dict[str, int]:
    """Rows and columns of a tile with about that many numbers a thread, in more warps where a row needs them."""
    columns = power_of_2(D)
    warps = min(max(columns // (32 * numbers), warps), 16)
    return {"ROWS": min(max(32 * warps * numbers // columns, 1), 16), "COLUMNS": columns, "num_warps": warps}


def _rows(x: Tensor | None, D: int) -> tuple[Tensor | None, int]:
    """x and the stride of its rows, or a copy where strides or address would make the compiler sum a row in another
    order than it does the rows of a fresh tensor."""
    if x is None:
        return None, 0
    if x.is_contiguous():
        return (x, D) if D % 16 or x.data_ptr() % 16 == 0 else (x.clone(), D)
    rows = x.reshape(-1, D)
    if D % 16 or rows.stride(0) % 16 or rows.stride(1) != 1 or rows.data_ptr() % 16:
        return rows.clone(memory_format=torch.contiguous_format), D
    return rows, rows.stride(0)
