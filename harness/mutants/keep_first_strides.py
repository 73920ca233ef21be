"""A scan is launched with the strides of the first call with its shape: its plan does not ask for them again."""

from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor

from harness.mutants import Scan, scan_with

WHERE = ("--subject", "scan", "--case", "B3-L19-*-N16-*", "--check", "strides")
FAILS = ("strides", "y*")


def plant() -> AbstractContextManager[None]:
    """Return the context in which the bug is there."""
    plans: dict[Any, tuple[int, ...]] = {}

    def bug(scan: Scan, u: Tensor, *others: Tensor, **rest: Any) -> tuple[Tensor, Tensor]:
        """Read u by the strides of the plan, as far as its memory goes."""
        strides = plans.setdefault((u.shape, u.dtype), u.stride())
        last = u.storage_offset() + sum((n - 1) * step for n, step in zip(u.shape, strides, strict=True))
        if u.untyped_storage().nbytes() >= (last + 1) * u.element_size():
            u = u.as_strided(u.shape, strides)
        return scan(u, *others, **rest)

    return scan_with(bug)
