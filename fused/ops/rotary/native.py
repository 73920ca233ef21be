"""The rotation by a kernel of this project, as the operator `videomamba::rotary`."""

import torch
from jaxtyping import Float
from torch import Tensor

from fused.ops.rotary import launch
from fused.runtime.dtypes import KERNEL_DTYPES
from fused.runtime.library import register, wants_gradients


def takes(x: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Return whether the kernel shall run: it has no gradient, and reads contiguous channels and angles in float32."""
    return (
        x.dtype in KERNEL_DTYPES and x.stride(3) == 1 and len(x) == len(cos)
        and cos.dtype == sin.dtype == torch.float32 and cos.is_contiguous() and sin.is_contiguous()
        and not wants_gradients(x, cos, sin)
    )  # fmt: skip


def rotary(
    x: Float[Tensor, "B H L C"], cos: Float[Tensor, "B 1 L K"], sin: Float[Tensor, "B 1 L K"]
) -> Float[Tensor, "B H L C"]:
    """Return x with the pairs of channels (c, c + C/2) rotated, contiguous; K is C/2. It has no gradient."""
    return _rotary(x, cos, sin)


def _forward_shapes(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


_rotary = register("rotary(Tensor x, Tensor cos, Tensor sin) -> Tensor", launch.forward, _forward_shapes)
