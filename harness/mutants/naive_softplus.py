"""softplus is computed as log(1 + exp(x)), which overflows for large x and loses the digits of small results."""

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from harness.mutants import Scan, scan_with

WHERE = ("--subject", "scan", "--case", "*-L9-*-delta=*", "--check", "extremes")
FAILS = ("extremes", "y*")


def plant() -> AbstractContextManager[None]:
    """Return the context in which the bug is there."""
    return scan_with(bug)


def bug(scan: Scan, u: Tensor, delta: Tensor, *others: Tensor, **rest: Any) -> tuple[Tensor, Tensor]:
    """Scan with steps that are computed beforehand, in float32."""
    bias = rest.pop("delta_bias")
    if rest.pop("softplus", True):
        raw = delta.float() if bias is None else delta.float() + bias
        delta = torch.log(1 + torch.exp(raw))
    return scan(u, delta, *others, **rest | {"softplus": False, "delta_bias": None})
