"""softplus's bias is omitted: delta = softplus(delta)."""

from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor

from harness.mutants import Scan, scan_with

WHERE = ("--subject", "scan", "--case", "B3-L7-*")
FAILS = ("forward", "y")


def plant() -> AbstractContextManager[None]:
    """Return the context in which the bug is there."""
    return scan_with(bug)


def bug(scan: Scan, *inputs: Tensor, **rest: Any) -> tuple[Tensor, Tensor]:
    """Scan without delta_bias."""
    return scan(*inputs, **rest | {"delta_bias": None})
