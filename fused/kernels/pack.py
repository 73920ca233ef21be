"""The weights of x_proj and dt_proj of every direction as the mixer's products want them, in one Triton launch."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import blocks, launching_on

BLOCK = 1024


@triton.jit
def pack_kernel(proj0, proj1, dt0, dt1, out, E, R, STEP, WIDTH, DIRECTIONS, BLOCK: tl.constexpr):
    row, d = tl.program_id(0), tl.program_id(2)
    e = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = e < E
    if row < WIDTH:
        proj = proj0 if d == 0 else proj1
        own = tl.where(row < R, row, row - (STEP - R))
        x = tl.load(proj + own * E + e, mask=inside & ((row < R) | (row >= STEP)), other=0.0)
        tl.store(out + (d * WIDTH + row) * E + e, x, mask=inside)
    else:
        dt, r = (dt0 if d == 0 else dt1), row - WIDTH
        x = tl.load(dt + e * R + r, mask=inside & (r < R), other=0.0)
        tl.store(out + (DIRECTIONS * WIDTH + d * STEP + r) * E + e, x, mask=inside)


def pack(proj: Sequence[Tensor], dt: Sequence[Tensor], step: int) -> tuple[Tensor, Tensor]:
    """x_proj (directions, step + 2N, E) and dt_proj (directions, step, E), of proj (R + 2N, E) and dt (E, R), contiguous and
    one or two each: rows of zeros stand between R and `step`, and dt is transposed."""
    count, (E, R) = len(proj), dt[0].shape
    width = proj[0].shape[0] - R + step
    out = torch.empty((count * (width + step), E), dtype=proj[0].dtype, device=proj[0].device)
    with launching_on(out.device):
        pack_kernel[width + step, blocks(E, BLOCK), count](
            proj[0], proj[-1], dt[0], dt[-1], out, E, R, step, width, count, BLOCK=BLOCK
        )  # fmt: skip
    both = out.split((count * width, count * step))
    return both[0].unflatten(0, (count, width)), both[1].unflatten(0, (count, step))
