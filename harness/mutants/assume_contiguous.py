"""Tokens are read as if they were contiguous, whatever their strides say."""

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from harness.mutants import Scan, scan_with

WHERE = ("--subject", "scan", "--case", "B3-L19-*-N16-*", "--check", "strides")
FAILS = ("strides", "y*")


def plant() -> AbstractContextManager[None]:
    """Return the context in which the bug is there."""
    return scan_with(bug)


def bug(scan: Scan, u: Tensor, *others: Tensor, **rest: Any) -> tuple[Tensor, Tensor]:
    """Scan what lies one after the other from u's first element on, if there is as much."""
    start = u.storage_offset()
    if u.untyped_storage().nbytes() >= (start + u.numel()) * u.element_size():
        u = u.as_strided(u.shape, torch.empty(u.shape, device="meta").stride(), start)
    return scan(u, *others, **rest)
