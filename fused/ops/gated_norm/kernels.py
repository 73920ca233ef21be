"""Triton source of the gated norm: each program keeps a row of one group in registers.

    s   = silu(z)
    v   = y s                         norm_before_gate: v = y
    r   = 1 / sqrt(mean(v^2) + eps)
    out = v r weight                  norm_before_gate: v r weight s

M is the number of rows, E their width, W the width of a group. All arithmetic is in float32. The order of a row's sums depends
only on W. For dweight each program sums its own rows in order; which rows a program has depends only on M.
"""

import triton
import triton.language as tl


@triton.jit
def _load(ptr: tl.tensor, row: tl.tensor, columns: tl.tensor, inside: tl.tensor, row_stride: tl.tensor):
    """Return the columns of a row in float32, zero where not `inside`."""
    return tl.load(ptr + row * row_stride + columns, mask=inside, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["M"])
def forward_kernel(
    y_ptr: tl.tensor, z_ptr: tl.tensor, weight_ptr: tl.tensor, out_ptr: tl.tensor,
    M: tl.tensor, E: tl.tensor, W: tl.tensor, y_row_stride: tl.tensor, z_row_stride: tl.tensor, eps: tl.tensor,
    NORM_BEFORE_GATE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute out (M, E)."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    columns, inside = tl.program_id(1) * W + i, i < W
    v = _load(y_ptr, row, columns, inside, y_row_stride)
    z = _load(z_ptr, row, columns, inside, z_row_stride)
    gate = z / (1.0 + tl.exp(-z))
    if not NORM_BEFORE_GATE:
        v *= gate
    out = v * tl.rsqrt(tl.sum(v * v, axis=0) / W + eps)
    out *= tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    if NORM_BEFORE_GATE:
        out *= gate
    tl.store(out_ptr + row * E + columns, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["M", "rows_per_program"])
def backward_kernel(
    dout_ptr: tl.tensor, y_ptr: tl.tensor, z_ptr: tl.tensor, weight_ptr: tl.tensor,
    dy_ptr: tl.tensor, dz_ptr: tl.tensor, partial_ptr: tl.tensor,
    M: tl.tensor, E: tl.tensor, W: tl.tensor, dout_row_stride: tl.tensor, y_row_stride: tl.tensor, z_row_stride: tl.tensor,
    eps: tl.tensor, rows_per_program: tl.tensor,
    NORM_BEFORE_GATE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute dy and dz (M, E), and each program's sums for dweight, (programs, E)."""
    i = tl.arange(0, BLOCK)
    columns, inside = tl.program_id(1) * W + i, i < W
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    dweight = tl.zeros((BLOCK,), tl.float32)
    first = tl.program_id(0).to(tl.int64) * rows_per_program
    for k in range(tl.minimum(rows_per_program, M - first)):
        row = first + k
        dout = _load(dout_ptr, row, columns, inside, dout_row_stride)
        y = _load(y_ptr, row, columns, inside, y_row_stride)
        z = _load(z_ptr, row, columns, inside, z_row_stride)
        sigmoid = 1.0 / (1.0 + tl.exp(-z))
        gate = z * sigmoid
        v = y if NORM_BEFORE_GATE else y * gate
        r = tl.rsqrt(tl.sum(v * v, axis=0) / W + eps)
        u = v * r
        g = dout * weight
        if NORM_BEFORE_GATE:
            dgate = g * u
            g *= gate
            dweight += dout * u * gate
        else:
            dweight += dout * u
        dv = r * (g - u * (tl.sum(g * u, axis=0) / W))
        if NORM_BEFORE_GATE:
            dy = dv
        else:
            dgate = dv * y
            dy = dv * gate
        dz = dgate * sigmoid * (1.0 + z * (1.0 - sigmoid))
        tl.store(dy_ptr + row * E + columns, dy.to(dy_ptr.dtype.element_ty), mask=inside)
        tl.store(dz_ptr + row * E + columns, dz.to(dz_ptr.dtype.element_ty), mask=inside)
    tl.store(partial_ptr + tl.program_id(0).to(tl.int64) * E + columns, dweight, mask=inside)
