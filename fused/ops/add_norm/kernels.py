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

import triton
import triton.language as tl


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
