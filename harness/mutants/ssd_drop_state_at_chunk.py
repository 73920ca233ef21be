"""The state of the SSD scan is dropped at one edge of chunks: tokens from 64 on start from zero."""

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from harness.mutants import Scan, ssd_with

WHERE = ("--subject", "ssd", "--case", "*-L130-H4-*")
FAILS = ("forward", "y")
CHUNK = 64


def plant() -> AbstractContextManager[None]:
    """Return the context in which the bug is there."""
    return ssd_with(bug)


def bug(ssd: Scan, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, **rest: Any) -> tuple[Tensor, Tensor]:
    """Run two scans without passing the state between them."""
    if x.shape[1] <= CHUNK:
        return ssd(x, dt, A, B, C, **rest)
    ids, first, final = rest.pop("seq_idx"), rest.pop("initial_state", None), None
    parts, spans = {}, (slice(CHUNK), slice(CHUNK, None))
    for span in reversed(spans) if rest.get("reverse") else spans:
        part = rest | {"z": None if rest.get("z") is None else rest["z"][:, span], "initial_state": first}
        part |= {"seq_idx": None if ids is None else ids[:, span]}
        parts[span.start or 0], final = ssd(x[:, span], dt[:, span], A, B[:, span], C[:, span], **part)
        first = None
    assert final is not None
    return torch.cat([parts[start] for start in sorted(parts)], dim=1), final
