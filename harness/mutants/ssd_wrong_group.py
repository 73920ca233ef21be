"""Heads of the SSD scan read B and C of the group after their own."""

from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor

from harness.mutants import Scan, ssd_with

WHERE = ("--subject", "ssd", "--case", "B3-L7-*-groups=2-*")
FAILS = ("forward", "y")


def plant() -> AbstractContextManager[None]:
    """Return the context in which the bug is there."""
    return ssd_with(bug)


def bug(ssd: Scan, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, **rest: Any) -> tuple[Tensor, Tensor]:
    """Scan with the groups of B and C in another order."""
    return ssd(x, dt, A, B.roll(1, 2), C.roll(1, 2), **rest)
