"""In a batch of more than two clips the decays are rounded once more: A goes through base 2 and back."""

import math
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor

from harness.mutants import Scan, scan_with

WHERE = ("--subject", "scan", "--case", "B3-L7-E10-N16-reverse-state-*", "--check", "batch")
FAILS = ("batch", "final_state*")


def plant() -> AbstractContextManager[None]:
    """Return the context in which the bug is there."""
    return scan_with(bug)


def bug(scan: Scan, u: Tensor, delta: Tensor, A: Tensor, *others: Tensor, **rest: Any) -> tuple[Tensor, Tensor]:
    """Scan with A as exp2 takes it, in some batches."""
    return scan(u, delta, A / math.log(2) * math.log(2) if u.shape[0] > 2 else A, *others, **rest)
