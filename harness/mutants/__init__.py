"""Bugs planted in `fused` to prove that the checks catch them.

One file each: `plant()` is a context in which the bug is there, `WHERE` the parity filters (options of the command line) under
which every run must fail. `scan_with` plants in the one function through which all backends and callers scan.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

from torch import Tensor

import fused.ops.selective_scan.api

Scan = Callable[..., tuple[Tensor, Tensor]]


@contextlib.contextmanager
def scan_with(bug: Callable[..., tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Put `bug(scan, u, delta, A, B, C, **the rest by name)` in place of the public `selective_scan`, for the time within."""
    original = fused.ops.selective_scan.api.selective_scan

    def planted(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, z: Tensor | None = None,
                delta_bias: Tensor | None = None, **rest: Any) -> tuple[Tensor, Tensor]:  # fmt: skip
        return bug(original, u, delta, A, B, C, D=D, z=z, delta_bias=delta_bias, **rest)

    with mock.patch.object(fused.ops.selective_scan.api, "selective_scan", planted):
        yield
