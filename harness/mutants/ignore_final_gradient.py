"""The gradient of the final state is ignored."""

from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor

from harness.mutants import Scan, scan_with

WHERE = ("--subject", "scan", "--case", "B3-L7-*")
FAILS = ("backward", "grad initial_state")


def plant() -> AbstractContextManager[None]:
    """Return the context in which the bug is there."""
    return scan_with(bug)


def bug(scan: Scan, *inputs: Tensor, **rest: Any) -> tuple[Tensor, Tensor]:
    """Scan, the final state cut from the graph."""
    y, final = scan(*inputs, **rest)
    return y, final.detach()
