"""Bugs planted in `fused` to prove that the checks catch them.

One file each: `plant()` is a context in which the bug is there, `WHERE` the parity filters (options of the command line) under
which every run must fail, and `FAILS` the check and the tensor (a pattern of names) that must fail there. `scan_with` and
`ssd_with` plant in the function through which backends and callers scan, `places_with` where the queries of BIMBA stand.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import fused.models.bimba.compressor
import fused.models.bimba.interleave
import fused.ops.mamba_inner.eager
import fused.ops.mamba_inner.segments
import fused.ops.selective_scan.api
import fused.ops.ssd.api

Scan = Callable[..., tuple[Tensor, Tensor]]


@contextlib.contextmanager
def scan_with(bug: Callable[..., tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Put `bug(scan, u, delta, A, B, C, **the rest by name)` in place of the public `selective_scan`, for the time within.

    A mixer on "torch" then runs operator by operator, and its scan of both directions scans them one by one through it.
    """
    original = fused.ops.selective_scan.api.selective_scan

    def planted(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, z: Tensor | None = None,
                delta_bias: Tensor | None = None, **rest: Any) -> tuple[Tensor, Tensor]:  # fmt: skip
        return bug(original, u, delta, A, B, C, D=D, z=z, delta_bias=delta_bias, **rest)

    def planted_both(
        u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, z: Tensor | None = None,
        delta_bias: Tensor | None = None, *, softplus: bool = True,
    ) -> Tensor:  # fmt: skip
        """Scan each direction by the planted function; tokens of the second are in the order of its scan, z's are not."""
        gates = (None, None) if z is None else (z, z.flip(1))
        biases = (None, None) if delta_bias is None else delta_bias.unbind()
        skips = (None, None) if D is None else D.unbind()
        pairs = zip(u, delta, A, B, C, skips, gates, biases, strict=True)
        first, second = (planted(*inputs, softplus=softplus, backend="torch")[0] for inputs in pairs)
        return first + second.flip(1)

    with mock.patch.object(fused.ops.selective_scan.api, "selective_scan", planted), mock.patch.object(
        fused.ops.mamba_inner.eager, "scan_both_directions", planted_both
    ), mock.patch.object(fused.ops.mamba_inner.segments, "takes", lambda *_: False):
        yield


@contextlib.contextmanager
def ssd_with(bug: Callable[..., tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Put `bug(ssd, x, dt, A, B, C, **the rest by name)` in place of the public `ssd`, for the time within."""
    original = fused.ops.ssd.api.ssd

    def planted(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, **rest: Any) -> tuple[Tensor, Tensor]:
        return bug(original, x, dt, A, B, C, **rest)

    with mock.patch.object(fused.ops.ssd.api, "ssd", planted):
        yield


@contextlib.contextmanager
def places_with(bug: Callable[[Tensor, int], Tensor]) -> Iterator[None]:
    """Let the queries of BIMBA stand at bug(places, number of tokens), ascending and distinct, for the time within."""
    module = fused.models.bimba.interleave
    original = module.interleave

    def planted(num_tokens: int, num_queries: int, device: torch.device) -> module.Places:
        moved = bug(original(num_tokens, num_queries), num_tokens)
        with mock.patch.object(module, "interleave", lambda *_: moved):
            return module.places_of.__wrapped__(num_tokens, num_queries, device)._replace(ratio=0)

    with mock.patch.object(fused.models.bimba.compressor, "places_of", planted):
        yield
