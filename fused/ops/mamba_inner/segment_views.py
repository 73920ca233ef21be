"""Tokens of a group of segments, and of one segment of it, as the operations of a mixer and the recurrence take them."""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from fused.ops.selective_scan.recurrence import Segment


def scan_order(x: Tensor, length: int) -> Tensor:
    """Return the tokens (2 * length,) that both directions meet, of one and the other in turn: 0, L-1, 1, L-2, ..."""
    if type(x) is Tensor:
        return _scan_order(length)
    return _new_scan_order(length)


def _new_scan_order(length: int) -> Tensor:
    first = torch.arange(length, device="cpu")
    return torch.stack((first, first.flip(0)), 1).flatten()


@functools.lru_cache(16)
def _scan_order(length: int) -> Tensor:
    with torch.inference_mode(False):
        return _new_scan_order(length)


def span_of(group: Sequence[Segment]) -> Segment:
    """Return the tokens of a group of segments as one segment."""
    return group[0] if len(group) == 1 else Segment(group[0].start, group[-1].stop, 1, False)


def steps(x: Tensor, group: Sequence[Segment]) -> list[Tensor]:
    """Return the segments of x (T, K, b, X), the tokens of a group, each as (t / c, c, K, b, 1, X), a view."""
    _, K, b, X = x.shape
    parts = x.split_with_sizes([segment.stop - segment.start for segment in group])
    return [part.view(s.num_splits, -1, K, b, 1, X).transpose(0, 1) for part, s in zip(parts, group, strict=True)]


def rows(x: Tensor) -> Tensor:
    """Return x (T, K, b, X) as rows of a matrix for each direction, (K, T*b, X); a view if b is 1."""
    return x.transpose(0, 1).flatten(1, 2)


def tokens(x: Tensor, clips: int) -> Tensor:
    """Return rows x (K, T*b, X) as (T, K, b, X), a view."""
    return x.unflatten(1, (-1, clips)).transpose(0, 1)
