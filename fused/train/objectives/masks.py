"""Token masks of masked pretraining, of the five kinds that VideoMamba compares (arXiv 2403.06977).

A mask is bool (B, 1 + T*P), True = hidden, as `VideoMambaEncoder.forward` takes it. Column 0 is CLS, which is always visible;
column 1 + f*P + p is patch p of tubelet f. All clips of a batch hide equally many tokens, each clip different ones. `grid` is
(tubelets T, rows, columns), of a model `(config.tubelets, *config.grid)`; P = rows * columns. `ratio` is a number in [0, 1).
Of n candidates int(ratio * n) are hidden, as upstream does; this may be none, and at least one is always left. `generator`:
see `fused.train.random`. Masks are on the CPU, where the model reads them without waiting for a GPU; `attention_mask` is on
the attention's device.
"""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fused.models.videomamba.embedding import visible_tokens
from fused.rules import check_integer, check_number
from fused.runtime.checks import check_tensor
from fused.train.random import gumbel_noise, random_subset

Grid = tuple[int, int, int]
Mask = Bool[Tensor, "B L"]


def random_mask(batch: int, grid: Grid, ratio: int | float, generator: torch.Generator | None = None) -> Mask:
    """Return a mask of kind "random", bool (batch, 1 + T*P): int(ratio * T*P) of a clip's T*P patches are hidden.

    Raises TypeError or ValueError for arguments out of range.
    """
    frames, rows, columns = _checked_grid("random_mask", batch, grid, ratio)
    patches = frames * rows * columns
    return _prepend_cls(random_subset(batch, patches, int(ratio * patches), generator))


def tube_mask(batch: int, grid: Grid, ratio: int | float, generator: torch.Generator | None = None) -> Mask:
    """Return a mask of kind "tube", bool (batch, 1 + T*P): the same int(ratio * P) patches are hidden in every frame.

    Raises TypeError or ValueError for arguments out of range.
    """
    frames, rows, columns = _checked_grid("tube_mask", batch, grid, ratio)
    hidden = random_subset(batch, rows * columns, int(ratio * rows * columns), generator)
    return _prepend_cls(hidden[:, None].expand(-1, frames, -1))


def clip_row_mask(batch: int, grid: Grid, ratio: int | float, generator: torch.Generator | None = None) -> Mask:
    """Return a mask of kind "clip-row", bool (batch, 1 + T*P): T * int(ratio * rows) rows of patches of the clip are hidden.

    Frames differ in how many rows they lose. Upstream calls this random_row. Raises TypeError or ValueError for arguments out
    of range.
    """
    frames, rows, columns = _checked_grid("clip_row_mask", batch, grid, ratio)
    hidden = random_subset(batch, frames * rows, frames * int(ratio * rows), generator)
    return _prepend_cls(hidden[:, :, None].expand(-1, -1, columns))


def frame_row_mask(batch: int, grid: Grid, ratio: int | float, generator: torch.Generator | None = None) -> Mask:
    """Return a mask of kind "frame-row", bool (batch, 1 + T*P): int(ratio * rows) rows of patches of every frame are hidden.

    Each frame hides different rows. Upstream calls this tube_row. Raises TypeError or ValueError for arguments out of range.
    """
    frames, rows, columns = _checked_grid("frame_row_mask", batch, grid, ratio)
    hidden = random_subset(batch * frames, rows, int(ratio * rows), generator)
    return _prepend_cls(hidden.view(batch, frames * rows, 1).expand(-1, -1, columns))


def attention_mask(
    attention: Float[Tensor, "B T P"], ratio: int | float, generator: torch.Generator | None = None
) -> Bool[Tensor, "B L"]:
    """Return a mask of kind "attention", bool (B, 1 + T*P) on the attention's device (UMT, arXiv 2303.16058).

    In every frame P - int(ratio * P) patches stay visible, drawn without replacement with probability proportional to
    `attention`. `attention` is that of the teacher's CLS on the patches of a frame, averaged over heads, of the last layer in
    UMT: any floating-point dtype, 0 or more, of any sum. A patch of attention 0 stays only if all patches of positive
    attention do.

    Raises TypeError or ValueError for another shape or dtype, for an attention that is negative, infinite or NaN, and for a
    ratio out of range.
    """
    check_tensor("attention_mask", "attention", attention, "B T P", {}, None)
    check_number("attention_mask", "ratio", ratio, 0, 1, "[)")
    if not attention.numel():
        raise ValueError(f"attention_mask: attention must not be empty, got {tuple(attention.shape)}")
    low, high = torch.stack(attention.detach().aminmax()).tolist()
    if not (low >= 0 and high < float("inf")):
        raise ValueError(f"attention_mask: attention must be finite and 0 or more, got values from {low:g} to {high:g}")
    weight = attention.detach().float()
    log_weight = weight.clamp_min(torch.finfo(torch.float32).tiny).log()
    score = log_weight + gumbel_noise(tuple(weight.shape), generator, weight.device)
    patches = weight.shape[2]
    visible = score.topk(patches - int(ratio * patches), dim=2).indices
    return _prepend_cls(torch.ones_like(score, dtype=torch.bool).scatter_(2, visible, False))


def keep_visible(features: Float[Tensor, "*K B L C"], mask: Bool[Tensor, "B L"]) -> Float[Tensor, "*K B V C"]:
    """Return the features of the tokens that a mask leaves visible, in their order.

    Applied to a teacher's features, these are the targets of the student's. `features` is (B, L, C), or (K, B, L, C) of K
    layers, any dtype; token 0 is CLS in both arguments. Gradients pass through. Raises ValueError for a mask that does not
    fit or hides unequally many tokens.
    """
    if features.dim() < 3:
        raise ValueError(f"keep_visible: features must have shape (..., B, L, C), got {tuple(features.shape)}")
    clips, length = features.shape[-3:-1]
    visible = visible_tokens(mask, clips, length, features.device)
    return features[..., torch.arange(clips, device=features.device)[:, None], visible, :]


MASKS: dict[str, Callable[..., Mask]] = {
    "random": random_mask, "tube": tube_mask, "clip-row": clip_row_mask, "frame-row": frame_row_mask
}  # fmt: skip
"""The kinds of masks that need no attention of a teacher, by name."""


def _checked_grid(op: str, batch: int, grid: Grid, ratio: int | float) -> Grid:
    """Return the grid. Raise TypeError or ValueError for arguments out of range."""
    check_integer(op, "batch", batch, 1)
    if not isinstance(grid, tuple) or len(grid) != 3:
        raise TypeError(f"{op}: grid must be a tuple (tubelets, rows, columns) of positive integers, got {grid!r}")
    for name, size in zip(("tubelets", "rows", "columns"), grid, strict=True):
        check_integer(op, f"grid's {name}", size, 1)
    check_number(op, "ratio", ratio, 0, 1, "[)")
    return grid


def _prepend_cls(hidden: Tensor) -> Tensor:
    """Return a mask (B, 1 + T*P) with a visible CLS before the patches of `hidden` (B, ...)."""
    hidden = hidden.flatten(1)
    return torch.cat((hidden.new_zeros(len(hidden), 1), hidden), dim=1)
