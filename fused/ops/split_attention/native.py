"""The attention of few queries to many keys by kernels of this project, as the operator `videomamba::split_attention`."""

import torch
from jaxtyping import Float
from torch import Tensor

from fused.ops.split_attention import launch
from fused.runtime.dtypes import KERNEL_DTYPES
from fused.runtime.library import register, wants_gradients

LEAST_KEYS = 1024  # below, one program a head is no slower


def takes(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Return whether the kernels shall run: few rows q (B, G, R, C), many keys k (B, G, M, C), and no gradient is wanted."""
    return (
        q.shape[2] <= launch.MAX_ROWS and k.shape[2] >= LEAST_KEYS and q.shape[3] <= 256
        and q.dtype == k.dtype == v.dtype and q.dtype in KERNEL_DTYPES
        and k.stride(3) == v.stride(3) == 1 and not wants_gradients(q, k, v)
    )  # fmt: skip


def split_attention(
    q: Float[Tensor, "B G R C"], k: Float[Tensor, "B G M C"], v: Float[Tensor, "B G M C"]
) -> Float[Tensor, "B G R C"]:
    """Return softmax(q k^T / sqrt(C)) v for at most 64 rows of queries a head, in q's dtype; it has no gradient.

    Products are summed in float32, softmax is computed in float32, probabilities are rounded to v's dtype for the product.
    """
    return _split_attention(q, k, v)


def _forward_shapes(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


_split_attention = register("split_attention(Tensor q, Tensor k, Tensor v) -> Tensor", launch.forward, _forward_shapes)
