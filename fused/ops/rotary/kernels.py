"""Triton source of the rotation of a head's channels: one program a token and head.

    y_c = x_c cos_c - x_(c + C/2) sin_c            y_(c + C/2) = x_(c + C/2) cos_c + x_c sin_c            c < C/2

All arithmetic is in float32, the result is rounded once.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["L"])
def rotate_kernel(
    x_ptr: tl.tensor, cos_ptr: tl.tensor, sin_ptr: tl.tensor, out_ptr: tl.tensor,
    L: tl.tensor, H: tl.tensor, HALF: tl.tensor, x_batch: tl.tensor, x_head: tl.tensor, x_row: tl.tensor,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute out (B, H, L, C), contiguous, of x (B, H, L, C) with contiguous channels, cos and sin (B, L, C/2)."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    batch, row = token // L, token % L
    c = tl.arange(0, BLOCK)
    inside = c < HALF
    x_ptr += batch * x_batch + head * x_head + row * x_row
    first = tl.load(x_ptr + c, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(x_ptr + HALF + c, mask=inside, other=0.0).to(tl.float32)
    cos = tl.load(cos_ptr + token * HALF + c, mask=inside, other=0.0)
    sin = tl.load(sin_ptr + token * HALF + c, mask=inside, other=0.0)
    out_ptr += ((batch * H + head) * L + row) * 2 * HALF
    tl.store(out_ptr + c, (first * cos - second * sin).to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(out_ptr + HALF + c, (second * cos + first * sin).to(out_ptr.dtype.element_ty), mask=inside)
