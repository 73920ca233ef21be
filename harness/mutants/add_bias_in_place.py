"""softplus's bias is added to delta in place: the caller's delta is another one afterwards."""

from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor

from harness.mutants import Scan, scan_with

WHERE = ("--subject", "scan", "--case", "B3-L7-E10-N16-reverse-state-*", "--check", "writes")
FAILS = ("writes", "delta")


def plant() -> AbstractContextManager[None]:
    """Return the context in which the bug is there."""
    return scan_with(bug)


def bug(scan: Scan, u: Tensor, delta: Tensor, *others: Tensor, **rest: Any) -> tuple[Tensor, Tensor]:
    """Scan, and leave delta as the scan used it."""
    results = scan(u, delta, *others, **rest)
    if (bias := rest["delta_bias"]) is not None:
        delta.data.add_(bias.data)
    return results
