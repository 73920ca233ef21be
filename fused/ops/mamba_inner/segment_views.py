"""Tokens of a group of segments, and of one segment of it, as the operations of a mixer and the recurrence take them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fused.ops.selective_scan.recurrence import Segment


def unflip(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return both directions of x (K, T, ...), tokens in their own order."""
    return x[0], x[1].flip(0)


def span_of(group: Sequence[Segment]) -> Segment:
    """Return the tokens of a group of segments as one segment."""
    return group[0] if len(group) == 1 else Segment(group[0].start, group[-1].stop, 1, False)


def join(parts: Sequence[Tensor]) -> Tensor:
    """Return parts (K, t, b, E) of a group one after the other, (K, T, b, E)."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=1)


def segment_of(x: Tensor, segment: Segment, whole: Segment) -> Tensor:
    """Return a segment (K, t, ...) of x (K, T, ...), whose tokens are those of `whole`, a view."""
    return x if segment is whole else x[:, segment.start - whole.start : segment.stop - whole.start]


def steps(x: Tensor, segment: Segment, whole: Segment) -> Tensor:
    """Return a segment of x (K, T, b, X), whose tokens are those of `whole`, as (T / c, c, K, b, 1, X), a view."""
    K, length, b, X = (part := segment_of(x, segment, whole)).shape
    return part.view(K, segment.num_splits, length // segment.num_splits, b, 1, X).permute(2, 1, 0, 3, 4, 5)


def tokens(x: Tensor) -> Tensor:
    """Return x (T, c, K, b, 1, X) as (K, c * T, b, X)."""
    return x.permute(2, 1, 0, 3, 4, 5).flatten(4).flatten(1, 2)
