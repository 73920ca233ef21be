"""dy silu(z) in Triton: the gradient of what the gate multiplies, where another kernel has made the rest."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused.runtime.triton_launch import blocks, launching_on

BLOCK = 1024


@triton.jit(do_not_specialize=["L", "E"])
def gate_kernel(dy, z, out, L, E, dy_clip, dy_token, z_clip, z_token, BLOCK: tl.constexpr):
    token, e = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    clip, t, inside = token // L, token % L, e < E
    g = tl.load(z + clip * z_clip + t * z_token + e, mask=inside).to(tl.float32)
    d = tl.load(dy + clip * dy_clip + t * dy_token + e, mask=inside).to(tl.float32)
    tl.store(out + token * E + e, (d * g / (1.0 + tl.exp(-g))).to(out.dtype.element_ty), mask=inside)


def gate(dy: Tensor, z: Tensor) -> Tensor:
    """dy * silu(z), both (B, L, E) with unit stride along E, computed in float32 and rounded once to dy's dtype."""
    B, L, E = dy.shape
    out = torch.empty((B, L, E), dtype=dy.dtype, device=dy.device)
    if out.numel():
        with launching_on(dy.device):
            gate_kernel[(B * L, blocks(E, BLOCK))](
                dy, z, out, L, E, dy.stride(0), dy.stride(1), z.stride(0), z.stride(1), BLOCK=BLOCK
            )  # fmt: skip
    return out
