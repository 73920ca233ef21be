"""The dtypes that operators read and compute in."""

import torch

KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
"""The dtypes that the kernels on a GPU read."""


def dtype_name(dtype: torch.dtype) -> str:
    """Return "bfloat16" for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which tensors of `dtype` are computed, summed and carried as states: at least float32."""
    return torch.promote_types(dtype, torch.float32)
