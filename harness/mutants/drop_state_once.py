"""The state is dropped once, in mid-sequence: the second half starts from zero."""

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from harness.mutants import Scan, scan_with

WHERE = ("--subject", "scan", "--case", "*-L63-*")
FAILS = ("forward", "y")


def plant() -> AbstractContextManager[None]:
    """Return the context in which the bug is there."""
    return scan_with(bug)


def bug(scan: Scan, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, **rest: Any) -> tuple[Tensor, Tensor]:
    """Run two scans without passing the state between them; the initial state reaches the half that is scanned first."""
    if u.shape[1] < 16:
        return scan(u, delta, A, B, C, **rest)
    half, z = u.shape[1] // 2, rest.pop("z")
    halves = (slice(half, None), slice(half)) if rest.get("reverse") else (slice(half), slice(half, None))
    parts = {}
    for part in halves:
        z_part = None if z is None else z[:, part]
        parts[part.start or 0], final = scan(u[:, part], delta[:, part], A, B[:, part], C[:, part], z=z_part, **rest)
        rest["initial_state"] = None
    return torch.cat([parts[start] for start in sorted(parts)], dim=1), final
