"""D per channel is taken for D per head: every channel of a head has the D of its first."""

from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor

from harness.mutants import Scan, ssd_with

WHERE = ("--subject", "ssd", "--case", "B3-L7-*-channels-*")
FAILS = ("forward", "y")


def plant() -> AbstractContextManager[None]:
    """Return the context in which the bug is there."""
    return ssd_with(bug)


def bug(ssd: Scan, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, **rest: Any) -> tuple[Tensor, Tensor]:
    """Scan with the first column of D."""
    D = rest.get("D")
    return ssd(x, dt, A, B, C, **rest | {"D": D[:, 0] if D is not None and D.dim() == 2 else D})
