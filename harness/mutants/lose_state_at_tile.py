"""The state is lost at an edge of tiles of 16 tokens: what is scanned after the first such edge starts from zero."""

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from harness.mutants import Scan, scan_with

WHERE = ("--subject", "scan", "--case", "*-L63-*")
FAILS = ("forward", "y")
TILE = 16


def plant() -> AbstractContextManager[None]:
    """Return the context in which the bug is there."""
    return scan_with(bug)


def bug(scan: Scan, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, **rest: Any) -> tuple[Tensor, Tensor]:
    """Run two scans without passing the state, from the first tile edge in the order of the scan on."""
    length, z = u.shape[1], rest.pop("z")
    edge = (length - 1) // TILE * TILE if rest.get("reverse") else TILE
    if not 0 < edge < length:
        return scan(u, delta, A, B, C, z=z, **rest)
    parts: dict[int, Tensor] = {}
    order = (slice(edge, None), slice(edge)) if rest.get("reverse") else (slice(edge), slice(edge, None))
    for part in order:
        z_part = None if z is None else z[:, part]
        parts[part.start or 0], final = scan(u[:, part], delta[:, part], A, B[:, part], C[:, part], z=z_part, **rest)
        rest["initial_state"] = None
    return torch.cat([parts[start] for start in sorted(parts)], dim=1), final
