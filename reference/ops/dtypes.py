"""The dtype in which operators compute."""

import torch


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which tensors of `dtype` are computed, summed and carried as states: at least float32."""
    return torch.promote_types(dtype, torch.float32)
