"""The gradient of the SSD scan's final state is ignored."""

from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor

from harness.mutants import Scan, ssd_with

WHERE = ("--subject", "ssd", "--case", "B3-L7-*-state-*")
FAILS = ("backward", "grad initial_state")


def plant() -> AbstractContextManager[None]:
    """Return the context in which the bug is there."""
    return ssd_with(bug)


def bug(ssd: Scan, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, **rest: Any) -> tuple[Tensor, Tensor]:
    """Scan, the final state cut from the graph."""
    y, final = ssd(x, dt, A, B, C, **rest)
    return y, final.detach()
