"""The limits of the SSD scan's steps are applied before the softplus."""

from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor

from harness.mutants import Scan, ssd_with

WHERE = ("--subject", "ssd", "--case", "B3-L7-*-limits-*")
FAILS = ("forward", "y")


def plant() -> AbstractContextManager[None]:
    """Return the context in which the bug is there."""
    return ssd_with(bug)


def bug(ssd: Scan, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, **rest: Any) -> tuple[Tensor, Tensor]:
    """Scan with dt clamped first."""
    raw = dt if rest.get("dt_bias") is None else dt + rest["dt_bias"]
    return ssd(x, raw.clamp(*rest["dt_limit"]), A, B, C, **rest | {"dt_bias": None, "dt_limit": (0.0, float("inf"))})
