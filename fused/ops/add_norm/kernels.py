"""Triton source of the residual addition and normalisation: each program keeps whole rows in registers.

    v    = k x + residual                   u = (v - mean) rstd        (RMSNorm: mean is 0)
    y    = u weight + bias                  rstd = 1 / sqrt(mean((v - mean)^2) + eps)
    g    = dy weight
    dv   = (g - u mean(g u) - mean(g)) rstd + dout                     (RMSNorm: without mean(g))
    dx   = k dv
    dweight = sum over rows of dy u         dbias = sum over rows of dy

k is 1, or with stochastic depth a number for each clip: 0, or `scale` for a clip that is kept.
M is the number of rows, D their width. All arithmetic is in float32, whatever the dtypes of inputs and outputs. The order in
which a row is summed depends only on D and the dtypes, so a row's result does not depend on the other rows. For dweight and
dbias each program sums its own rows in order, then the programs' sums are added in order. Which rows a program has depends only
on M.
"""

import triton
import triton.language as tl


@triton.jit
def _load(ptr: tl.tensor, rows: tl.tensor, columns: tl.tensor, M: tl.tensor, D: tl.tensor, row_stride: tl.tensor):
    """Return (BLOCK_ROWS, BLOCK_COLUMNS) of a matrix (M, D) in float32, zero outside of it.

    The data are evicted from the cache first, because other data are read again sooner.
    """
    inside = (rows < M)[:, None] & (columns < D)[None, :]
    ptrs = ptr + rows.to(tl.int64)[:, None] * row_stride + columns[None, :]
    return tl.load(ptrs, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)


@triton.jit
def _store(
    ptr: tl.tensor, value: tl.tensor, rows: tl.tensor, columns: tl.tensor, M: tl.tensor, D: tl.tensor,
    STREAMING: tl.constexpr = False,
):  # fmt: skip
    """Store (BLOCK_ROWS, BLOCK_COLUMNS) to a contiguous matrix (M, D); STREAMING is for data that are not read again soon."""
    inside = (rows < M)[:, None] & (columns < D)[None, :]
    offsets = rows.to(tl.int64)[:, None] * D + columns[None, :]
    tl.store(ptr + offsets, value.to(ptr.dtype.element_ty), mask=inside, cache_modifier=".cs" if STREAMING else "")


@triton.jit
def _depth_scale(kept_ptr: tl.tensor, scale: tl.tensor, rows: tl.tensor, M: tl.tensor, rows_per_clip: tl.tensor):
    """Return k (BLOCK_ROWS, 1) of the rows' clips; kept is 0 or 1 for each clip."""
    return (tl.load(kept_ptr + rows // rows_per_clip, mask=rows < M, other=0.0) * scale)[:, None]


@triton.jit(do_not_specialize=["M", "rows_per_clip"])
def forward_kernel(
    x_ptr: tl.tensor, kept_ptr: tl.tensor, residual_ptr: tl.tensor, weight_ptr: tl.tensor, bias_ptr: tl.tensor,
    y_ptr: tl.tensor, out_ptr: tl.tensor, mean_ptr: tl.tensor, rstd_ptr: tl.tensor,
    M: tl.tensor, D: tl.tensor, x_row_stride: tl.tensor, residual_row_stride: tl.tensor, rows_per_clip: tl.tensor,
    scale: tl.tensor, eps: tl.tensor, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Compute y, v (M, D), mean and rstd (M,); v is stored to `out`.

    kept (clips,), residual, bias and out may be None; mean is None for RMSNorm.
    """
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = tl.arange(0, BLOCK_COLUMNS)
    v = _load(x_ptr, rows, columns, M, D, x_row_stride)
    if kept_ptr is not None:
        v *= _depth_scale(kept_ptr, scale, rows, M, rows_per_clip)
    if residual_ptr is not None:
        v += _load(residual_ptr, rows, columns, M, D, residual_row_stride)
    if out_ptr is not None:
        _store(out_ptr, v, rows, columns, M, D, STREAMING=True)  # the next norm reads it, after a whole mixer
    if mean_ptr is not None:
        mean = tl.sum(v, axis=1) / D
        tl.store(mean_ptr + rows, mean, mask=rows < M)
        v = tl.where((columns < D)[None, :], v - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(v * v, axis=1) / D + eps)
    tl.store(rstd_ptr + rows, rstd, mask=rows < M)
    y = v * rstd[:, None] * tl.load(weight_ptr + columns, mask=columns < D, other=0.0).to(tl.float32)[None, :]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + columns, mask=columns < D, other=0.0).to(tl.float32)[None, :]
    _store(y_ptr, y, rows, columns, M, D)


@triton.jit(do_not_specialize=["M", "rows_per_clip", "tiles_per_program"])
def backward_kernel(
    dy_ptr: tl.tensor, dout_ptr: tl.tensor, x_ptr: tl.tensor, kept_ptr: tl.tensor, residual_ptr: tl.tensor,
    weight_ptr: tl.tensor, mean_ptr: tl.tensor, rstd_ptr: tl.tensor, dx_ptr: tl.tensor, dresidual_ptr: tl.tensor,
    partial_dweight_ptr: tl.tensor, partial_dbias_ptr: tl.tensor,
    M: tl.tensor, D: tl.tensor, dy_row_stride: tl.tensor, dout_row_stride: tl.tensor,
    x_row_stride: tl.tensor, residual_row_stride: tl.tensor, rows_per_clip: tl.tensor, scale: tl.tensor,
    tiles_per_program: tl.tensor, X_IS_V: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Compute dx and dresidual (M, D), and each program's sums for dweight and dbias, (programs, D).

    A program has `tiles_per_program` tiles of rows. x is v itself if X_IS_V, else v is k x, plus residual unless that is
    None. kept (clips,), dout, dresidual and partial_dbias may be None; mean is None for RMSNorm.
    """
    columns = tl.arange(0, BLOCK_COLUMNS)
    weight = tl.load(weight_ptr + columns, mask=columns < D, other=0.0).to(tl.float32)[None, :]
    dweight = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    if partial_dbias_ptr is not None:
        dbias = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    for i in range(tiles_per_program):
        rows = (tl.program_id(0) * tiles_per_program + i) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        g = _load(dy_ptr, rows, columns, M, D, dy_row_stride)
        u = _load(x_ptr, rows, columns, M, D, x_row_stride)
        if kept_ptr is not None:
            k = _depth_scale(kept_ptr, scale, rows, M, rows_per_clip)
            if not X_IS_V:
                u *= k
        if residual_ptr is not None:
            u += _load(residual_ptr, rows, columns, M, D, residual_row_stride)
        if mean_ptr is not None:
            mean = tl.load(mean_ptr + rows, mask=rows < M, other=0.0)
            u = tl.where((columns < D)[None, :], u - mean[:, None], 0.0)
        rstd = tl.load(rstd_ptr + rows, mask=rows < M, other=0.0)[:, None]
        u *= rstd
        dweight += g * u
        if partial_dbias_ptr is not None:
            dbias += g
        g *= weight
        dv = g - u * (tl.sum(g * u, axis=1) / D)[:, None]
        if mean_ptr is not None:
            dv -= (tl.sum(g, axis=1) / D)[:, None]
        dv *= rstd
        if dout_ptr is not None:
            dv += _load(dout_ptr, rows, columns, M, D, dout_row_stride)
        _store(dx_ptr, dv if kept_ptr is None else dv * k, rows, columns, M, D)
        if dresidual_ptr is not None:
            _store(dresidual_ptr, dv, rows, columns, M, D)
    offsets = tl.program_id(0).to(tl.int64) * D + columns
    tl.store(partial_dweight_ptr + offsets, tl.sum(dweight, axis=0), mask=columns < D)
    if partial_dbias_ptr is not None:
        tl.store(partial_dbias_ptr + offsets, tl.sum(dbias, axis=0), mask=columns < D)


@triton.jit(do_not_specialize=["programs"])
def reduce_kernel(
    partial_dweight_ptr: tl.tensor, partial_dbias_ptr: tl.tensor, dweight_ptr: tl.tensor, dbias_ptr: tl.tensor,
    programs: tl.tensor, D: tl.tensor, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Sum (programs, D) over the programs: dweight in the first row of the grid, dbias in the second, if there is one."""
    columns = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    for i in range(0, programs, BLOCK_ROWS):
        rows = i + tl.arange(0, BLOCK_ROWS)
        if tl.program_id(1) == 0:
            total += _load(partial_dweight_ptr, rows, columns, programs, D, D)
        elif partial_dbias_ptr is not None:
            total += _load(partial_dbias_ptr, rows, columns, programs, D, D)
    result = tl.sum(total, axis=0)
    if tl.program_id(1) == 0:
        tl.store(dweight_ptr + columns, result.to(dweight_ptr.dtype.element_ty), mask=columns < D)
    elif partial_dbias_ptr is not None:
        tl.store(dbias_ptr + columns, result.to(dbias_ptr.dtype.element_ty), mask=columns < D)
