"""A mixer's weights as its products and its scan want them, of every direction in one Triton launch."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused.runtime.triton_launch import blocks, launching_on

BLOCK = 1024


@triton.jit
def _widen(first, second, at, to, d, inside):
    """Pointers of two dtypes cannot be one or the other; what is loaded through them can."""
    if d == 0:
        tl.store(to, tl.load(first + at, mask=inside).to(tl.float32), mask=inside)
    else:
        tl.store(to, tl.load(second + at, mask=inside).to(tl.float32), mask=inside)


@triton.jit
def pack_kernel(
    proj0, proj1, dt0, dt1, A0, A1, D0, D1, out, wide, E, R, N, STEP, WIDTH, DIRECTIONS, BLOCK: tl.constexpr
):  # fmt: skip
    row, d = tl.program_id(0), tl.program_id(2)
    e = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = e < E
    if row < WIDTH:
        proj = proj0 if d == 0 else proj1
        own = tl.where(row < R, row, row - (STEP - R))
        x = tl.load(proj + own * E + e, mask=inside & ((row < R) | (row >= STEP)), other=0.0)
        tl.store(out + (d * WIDTH + row) * E + e, x, mask=inside)
    elif row < WIDTH + STEP:
        dt, r = (dt0 if d == 0 else dt1), row - WIDTH
        x = tl.load(dt + e * R + r, mask=inside & (r < R), other=0.0)
        tl.store(out + (DIRECTIONS * WIDTH + d * STEP + r) * E + e, x, mask=inside)
    elif wide is not None:
        n = row - WIDTH - STEP
        at = wide + (d * (N + 1) + n) * E + e
        if n < N:
            _widen(A0, A1, n * E + e, at, d, inside)
        else:
            _widen(D0, D1, e, at, d, inside)


class Packed(NamedTuple):
    """Of every direction, in the dtype of matrix products but A and D, which are float32."""

    proj: Tensor  # (directions, step + 2N, E)
    dt: Tensor  # (directions, step, E)
    A: Sequence[Tensor]  # (E, N)
    D: Sequence[Tensor]  # (E,)

    def last(self, count: int) -> "Packed":
        """Of so many directions, the last ones."""
        return Packed(self.proj[-count:], self.dt[-count:], self.A[-count:], self.D[-count:])


def pack(proj: Sequence[Tensor], dt: Sequence[Tensor], A: Sequence[Tensor], D: Sequence[Tensor], step: int) -> Packed:
    """Of proj (R + 2N, E), dt (E, R), A (E, N) and D (E,), contiguous and one or two each: in proj rows of zeros stand between
    R and `step`, and dt is transposed. A and D are themselves where all of them are float32."""
    count, (E, R), N = len(proj), dt[0].shape, A[0].shape[1]
    width = proj[0].shape[0] - R + step
    out = torch.empty((count * (width + step), E), dtype=proj[0].dtype, device=proj[0].device)
    wide = None
    if any(x.dtype != torch.float32 for x in (*A, *D)):
        wide = torch.empty((count, (N + 1) * E), dtype=torch.float32, device=out.device)
    rows = width + step + (0 if wide is None else N + 1)
    with launching_on(out.device):
        pack_kernel[rows, blocks(E, BLOCK), count](
            proj[0], proj[-1], dt[0], dt[-1], A[0], A[-1], D[0], D[-1], out, wide, E, R, N, step, width, count, BLOCK=BLOCK
        )  # fmt: skip
    if wide is not None:
        both = wide.split((N * E, E), dim=1)
        A, D = both[0].unflatten(1, (E, N)).unbind(), both[1].unbind()
    products = out.split((count * width, count * step))
    return Packed(products[0].unflatten(0, (count, width)), products[1].unflatten(0, (count, step)), A, D)
