"""The last token is forgotten at L = 12545: its y is 0 and the state misses it."""

from contextlib import AbstractContextManager
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from harness.mutants import Scan, scan_with

WHERE = ("--subject", "scan", "--case", "*-L12545-*", "--check", "forward")
FAILS = ("forward", "final_state")
LENGTH = 12545


def plant() -> AbstractContextManager[None]:
    """Return the context in which the bug is there."""
    return scan_with(bug)


def bug(scan: Scan, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, **rest: Any) -> tuple[Tensor, Tensor]:
    """Scan one token less, at that length only."""
    if u.shape[1] != LENGTH:
        return scan(u, delta, A, B, C, **rest)
    u, delta, B, C = (t[:, :-1] for t in (u, delta, B, C))
    rest["z"] = None if rest["z"] is None else rest["z"][:, :-1]
    y, final = scan(u, delta, A, B, C, **rest)
    return F.pad(y, (0, 0, 0, 1)), final
