"""Offsets into x wrap around, as 32-bit ones do at 2^31: here at 2^16, so that a case of 4,099 tokens shows it."""

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from harness.mutants import Scan, ssd_with

WHERE = ("--subject", "ssd", "--case", "*-L4099-*", "--check", "forward")
FAILS = ("forward", "y")
WRAP = 2**16


def plant() -> AbstractContextManager[None]:
    """Return the context in which the bug is there."""
    return ssd_with(bug)


def bug(ssd: Scan, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, **rest: Any) -> tuple[Tensor, Tensor]:
    """Scan an x whose rows from the 2^16th element on are those from the beginning."""
    rows = WRAP // (x.shape[2] * x.shape[3])
    return ssd(x[:, torch.arange(x.shape[1], device=x.device) % rows], dt, A, B, C, **rest)
