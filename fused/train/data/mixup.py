"""Mixup (arXiv 1710.09412) and CutMix (arXiv 1905.04899) for clips: pixels of two clips, and their targets in proportion.

`clips` is floating point (B, C, T, H, W), or images (B, C, H, W), with B at least 2. A clip is mixed with the one before it
in the batch, which the data loader has shuffled; upstream pairs the first with the last. One lambda is drawn for a batch.
`targets` are classes, int64 (B,), below `classes`, or weights (B, classes). `generator`: see `fused.train.random`. All
functions raise TypeError or ValueError for arguments that do not fit.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fused.rules import check_integer, check_number
from fused.train.random import sample_beta, sample_integer, sample_uniform

Clips = Float[Tensor, "B C *T H W"]
Targets = Int[Tensor, " B"] | Float[Tensor, "B classes"]


class Mixed(NamedTuple):
    """A mixed batch."""

    clips: Tensor  # shape and dtype of the given clips
    targets: Tensor  # (B, classes), float32 or the dtype of the given weights; the sums of rows are kept


def mixup(
    clips: Clips, targets: Targets, classes: int, alpha: int | float = 0.8, generator: torch.Generator | None = None
) -> Mixed:
    """Return lambda * clip + (1 - lambda) * other clip, and targets likewise; lambda is from Beta(alpha, alpha), alpha > 0."""
    weights = _target_weights("mixup", clips, targets, classes)
    check_number("mixup", "alpha", alpha, 0, math.inf, "()")
    lam = sample_beta(alpha, generator)
    return Mixed(clips.roll(1, 0).lerp(clips, lam), weights.roll(1, 0).lerp(weights, lam))


def cutmix(
    clips: Clips, targets: Targets, classes: int, alpha: int | float = 1.0, generator: torch.Generator | None = None
) -> Mixed:
    """Return clips with a box of the other clip, the same box in all frames, and targets in proportion to the pixels.

    The box has sqrt(1 - lambda) of each side, lambda from Beta(alpha, alpha), alpha > 0, around a centre anywhere in the
    frame. It is clipped at the border, and the targets' proportion is that of the clipped box.
    """
    weights = _target_weights("cutmix", clips, targets, classes)
    check_number("cutmix", "alpha", alpha, 0, math.inf, "()")
    side = math.sqrt(1 - sample_beta(alpha, generator))
    height, width = clips.shape[-2:]
    (top, bottom), (left, right) = _box_range(height, side, generator), _box_range(width, side, generator)
    mixed = clips.clone()
    mixed[..., top:bottom, left:right] = clips.roll(1, 0)[..., top:bottom, left:right]
    lam = 1 - (bottom - top) * (right - left) / (height * width)
    return Mixed(mixed, weights.roll(1, 0).lerp(weights, lam))


def mix(
    clips: Clips, targets: Targets, classes: int, mixup_alpha: int | float = 0.8, cutmix_alpha: int | float = 1.0,
    probability: int | float = 1.0, switch: int | float = 0.5, generator: torch.Generator | None = None,
) -> Mixed:  # fmt: skip
    """Return the batch mixed with `probability`: by `cutmix` with probability `switch`, else by `mixup`.

    An alpha of 0 switches that one off. The defaults are upstream's for fine-tuning.
    """
    weights = _target_weights("mix", clips, targets, classes)
    for name, value in (("mixup_alpha", mixup_alpha), ("cutmix_alpha", cutmix_alpha)):
        check_number("mix", name, value, 0, math.inf, "[)")
    for name, value in (("probability", probability), ("switch", switch)):
        check_number("mix", name, value, 0, 1)
    apply, use_cutmix = sample_uniform(generator) < probability, sample_uniform(generator) < switch
    if not apply or not (mixup_alpha or cutmix_alpha):
        return Mixed(clips, weights)
    if cutmix_alpha and (use_cutmix or not mixup_alpha):
        return cutmix(clips, weights, classes, cutmix_alpha, generator)
    return mixup(clips, weights, classes, mixup_alpha, generator)


def _box_range(size: int, side: float, generator: torch.Generator | None) -> tuple[int, int]:
    """Return first and end pixel of a box along one axis of `size` pixels; `side` is the box's fraction of it."""
    half, centre = int(size * side) // 2, sample_integer(size, generator)
    return max(centre - half, 0), min(centre + half, size)


def _target_weights(op: str, clips: Tensor, targets: Tensor, classes: int) -> Float[Tensor, "B classes"]:
    """Return the targets as weights (B, classes). Raise ValueError for clips or targets that do not fit."""
    check_integer(op, "classes", classes, 1)
    if clips.dim() not in (4, 5) or len(clips) < 2 or not clips.is_floating_point():
        expected = "floating point (B, C, T, H, W) or (B, C, H, W) with B at least 2"
        raise ValueError(f"{op}: clips must be {expected}, got {clips.dtype} {tuple(clips.shape)}")
    soft = targets.is_floating_point()
    if tuple(targets.shape) != ((len(clips), classes) if soft else (len(clips),)) or not (soft or targets.dtype == torch.int64):
        expected = f"int64 classes (B={len(clips)},) or floating-point weights (B={len(clips)}, classes={classes})"
        raise ValueError(f"{op}: targets must be {expected}, got {targets.dtype} {tuple(targets.shape)}")
    if soft:
        return targets
    low, high = torch.stack(targets.aminmax()).tolist()
    if low < 0 or high >= classes:
        raise ValueError(f"{op}: targets must be classes 0 to {classes - 1}, got {low} to {high}")
    weights = torch.zeros(len(clips), classes, device=targets.device)
    return weights.scatter_(1, targets[:, None], 1)  # F.one_hot would check the range a second time
