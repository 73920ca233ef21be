"""Mixup (arXiv 1710.09412) and CutMix (arXiv 1905.04899) for clips: pixels of two clips, and their classes in that share.

`clips` is floating point (B, C, T, H, W), or images (B, C, H, W), B at least 2: each is mixed with the one before it in the
batch, which the data loader has shuffled (upstream pairs the first with the last). One share is drawn for a batch.
`targets` are classes, int64 (B,), below `classes`, or weights (B, classes). `generator`: see `fused.train.random`. All raise
TypeError or ValueError for what does not fit.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fused.rules import check_integer, check_number
from fused.train.random import beta, uniform, uniform_integer

Clips = Float[Tensor, "B C *T H W"]
Targets = Int[Tensor, " B"] | Float[Tensor, "B classes"]


class Mixed(NamedTuple):
    """A mixed batch."""

    clips: Tensor  # like the clips that came
    targets: Tensor  # (B, classes), float32 or the dtype of the weights that came; rows sum to what they did


def mixup(
    clips: Clips, targets: Targets, classes: int, alpha: int | float = 0.8, generator: torch.Generator | None = None
) -> Mixed:
    """share * clip + (1 - share) * other, targets likewise; the share is drawn from Beta(alpha, alpha), alpha > 0."""
    weights = _weights("mixup", clips, targets, classes)
    check_number("mixup", "alpha", alpha, 0, math.inf, "()")
    share = beta(alpha, generator)
    return Mixed(clips.roll(1, 0).lerp(clips, share), weights.roll(1, 0).lerp(weights, share))


def cutmix(
    clips: Clips, targets: Targets, classes: int, alpha: int | float = 1.0, generator: torch.Generator | None = None
) -> Mixed:
    """A box of the other clip in place of one's own, the same in all frames; targets in the share of pixels.

    The box has sqrt(1 - share) of each side, share from Beta(alpha, alpha), alpha > 0, about a centre anywhere in the frame:
    at the border it is cut, and the targets' share is of what is left of it.
    """
    weights = _weights("cutmix", clips, targets, classes)
    check_number("cutmix", "alpha", alpha, 0, math.inf, "()")
    side = math.sqrt(1 - beta(alpha, generator))
    height, width = clips.shape[-2:]
    (top, bottom), (left, right) = _span(height, side, generator), _span(width, side, generator)
    mixed = clips.clone()
    mixed[..., top:bottom, left:right] = clips.roll(1, 0)[..., top:bottom, left:right]
    share = 1 - (bottom - top) * (right - left) / (height * width)
    return Mixed(mixed, weights.roll(1, 0).lerp(weights, share))


def mix(
    clips: Clips, targets: Targets, classes: int, mixup_alpha: int | float = 0.8, cutmix_alpha: int | float = 1.0,
    probability: int | float = 1.0, switch: int | float = 0.5, generator: torch.Generator | None = None,
) -> Mixed:  # fmt: skip
    """With `probability` the batch is mixed: by `cutmix` with probability `switch`, else by `mixup`; an alpha of 0 leaves
    only the other one. The defaults are upstream's for fine-tuning."""
    weights = _weights("mix", clips, targets, classes)
    for name, value in (("mixup_alpha", mixup_alpha), ("cutmix_alpha", cutmix_alpha)):
        check_number("mix", name, value, 0, math.inf, "[)")
    for name, value in (("probability", probability), ("switch", switch)):
        check_number("mix", name, value, 0, 1)
    mixes, cuts = uniform(generator) < probability, uniform(generator) < switch
    if not mixes or not (mixup_alpha or cutmix_alpha):
        return Mixed(clips, weights)
    if cutmix_alpha and (cuts or not mixup_alpha):
        return cutmix(clips, weights, classes, cutmix_alpha, generator)
    return mixup(clips, weights, classes, mixup_alpha, generator)


def _span(size: int, side: float, generator: torch.Generator | None) -> tuple[int, int]:
    """From and to of a box's side, in pixels within the frame."""
    half, centre = int(size * side) // 2, uniform_integer(size, generator)
    return max(centre - half, 0), min(centre + half, size)


def _weights(op: str, clips: Tensor, targets: Tensor, classes: int) -> Float[Tensor, "B classes"]:
    check_integer(op, "classes", classes, 1)
    if clips.dim() not in (4, 5) or len(clips) < 2 or not clips.is_floating_point():
        wanted = "floating point (B, C, T, H, W) or (B, C, H, W) with B at least 2"
        raise ValueError(f"{op}: clips must be {wanted}, got {clips.dtype} {tuple(clips.shape)}")
    soft = targets.is_floating_point()
    if tuple(targets.shape) != ((len(clips), classes) if soft else (len(clips),)) or not (soft or targets.dtype == torch.int64):
        wanted = f"int64 classes (B={len(clips)},) or floating-point weights (B={len(clips)}, classes={classes})"
        raise ValueError(f"{op}: targets must be {wanted}, got {targets.dtype} {tuple(targets.shape)}")
    if soft:
        return targets
    low, high = torch.stack(targets.aminmax()).tolist()
    if low < 0 or high >= classes:
        raise ValueError(f"{op}: targets must be classes 0 to {classes - 1}, got {low} to {high}")
    weights = torch.zeros(len(clips), classes, device=targets.device)
    return weights.scatter_(1, targets[:, None], 1)  # F.one_hot would look for the range again
