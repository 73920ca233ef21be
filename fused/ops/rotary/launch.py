"""The launch of the rotation."""

import torch
from torch import Tensor

from fused.ops.rotary.kernels import rotate_kernel
from fused.runtime import triton_launch
from fused.runtime.triton_launch import FUSED_MULTIPLY_ADD, power_of_2


def forward(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return x (B, H, L, C) rotated, contiguous; cos and sin (B, 1, L, C/2) are float32 and contiguous."""
    B, H, L, C = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel():
        triton_launch.launch(
            rotate_kernel, x.device, (B * L, H),
            x, cos, sin, out, L, H, C // 2, *x.stride()[:3],
            BLOCK=power_of_2(C // 2), num_warps=1, **FUSED_MULTIPLY_ADD,
        )  # fmt: skip
    return out
