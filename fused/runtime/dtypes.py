"""The dtypes that operators read and compute in."""

import torch

KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
"""The dtypes that the kernels on a GPU read."""


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which tensors of `dtype` are computed, summed and carried as states: at least float32."""
    return torch.promote_types(dtype, torch.float32)
