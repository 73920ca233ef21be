"""Which tokens masked pretraining hides, in the five ways that VideoMamba compares (arXiv 2403.06977).

Every mask is bool (B, 1 + T*P), True = hidden, as `VideoMambaEncoder.forward` takes it: column 0 is CLS, always visible, and
column 1 + f*P + p patch p of tubelet f. All clips of a batch hide equally many tokens, each clip others. `grid` is
(tubelets T, rows, columns), of a model `(config.tubelets, *config.grid)`; P = rows * columns. `ratio` is a number in [0, 1):
of n things to choose from int(ratio * n) are hidden, as upstream, which may be none; at least one is always left.
`generator`: see `fused.train.random`. Masks are on the CPU, where the model asks nothing of a GPU to read them;
`attention_mask` is where the attention is.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fused.models.videomamba.embedding import visible_tokens
from fused.rules import check_integer, check_number
from fused.runtime.checks import check_tensor
from fused.train.random import gumbel, subset

Grid = tuple[int, int, int]
Mask = Bool[Tensor, "B L"]


def random_mask(batch: int, grid: Grid, ratio: int | float, generator: torch.Generator | None = None) -> Mask:
    """Any patches of the clip ("random"): int(ratio * T*P) of its T*P.

    Returns bool (batch, 1 + T*P). Raises TypeError or ValueError for arguments out of range.
    """
    frames, rows, columns = _check("random_mask", batch, grid, ratio)
    patches = frames * rows * columns
    return _behind_cls(subset(batch, patches, int(ratio * patches), generator))


def tube_mask(batch: int, grid: Grid, ratio: int | float, generator: torch.Generator | None = None) -> Mask:
    """The same int(ratio * P) patches in every frame ("tube").

    Returns bool (batch, 1 + T*P). Raises TypeError or ValueError for arguments out of range.
    """
    frames, rows, columns = _check("tube_mask", batch, grid, ratio)
    hidden = subset(batch, rows * columns, int(ratio * rows * columns), generator)
    return _behind_cls(hidden[:, None].expand(-1, frames, -1))


def clip_row_mask(batch: int, grid: Grid, ratio: int | float, generator: torch.Generator | None = None) -> Mask:
    """Whole rows of patches, T * int(ratio * rows) of all rows of the clip ("clip-row"; upstream's random_row).

    Frames differ in how many they lose. Returns bool (batch, 1 + T*P). Raises TypeError or ValueError for arguments out of
    range.
    """
    frames, rows, columns = _check("clip_row_mask", batch, grid, ratio)
    hidden = subset(batch, frames * rows, frames * int(ratio * rows), generator)
    return _behind_cls(hidden[:, :, None].expand(-1, -1, columns))


def frame_row_mask(batch: int, grid: Grid, ratio: int | float, generator: torch.Generator | None = None) -> Mask:
    """Whole rows of patches, int(ratio * rows) in every frame, others in each ("frame-row"; upstream's tube_row).

    Returns bool (batch, 1 + T*P). Raises TypeError or ValueError for arguments out of range.
    """
    frames, rows, columns = _check("frame_row_mask", batch, grid, ratio)
    hidden = subset(batch * frames, rows, int(ratio * rows), generator)
    return _behind_cls(hidden.view(batch, frames * rows, 1).expand(-1, -1, columns))


def attention_mask(
    attention: Float[Tensor, "B T P"], ratio: int | float, generator: torch.Generator | None = None
) -> Bool[Tensor, "B L"]:
    """What a teacher looks at stays ("attention"): in every frame P - int(ratio * P) patches stay visible, drawn without
    replacement with a probability in proportion to `attention`.

    `attention` is from the teacher's CLS to the patches of a frame, averaged over heads, of the last layer in UMT: any
    floating-point dtype, 0 or more, of any sum. A patch of attention 0 stays only where all others do already.

    Returns bool (B, 1 + T*P) on the attention's device. Raises TypeError or ValueError for another shape or dtype, a
    negative, infinite or undefined attention, or a ratio out of range.
    """
    check_tensor("attention_mask", "attention", attention, "B T P", {}, None)
    check_number("attention_mask", "ratio", ratio, 0, 1, "[)")
    if not attention.numel():
        raise ValueError(f"attention_mask: attention must not be empty, got {tuple(attention.shape)}")
    low, high = torch.stack(attention.detach().aminmax()).tolist()
    if not (low >= 0 and high < float("inf")):
        raise ValueError(f"attention_mask: attention must be finite and 0 or more, got values from {low:g} to {high:g}")
    weight = attention.detach().float()
    score = weight.clamp_min(torch.finfo(torch.float32).tiny).log() + gumbel(tuple(weight.shape), generator, weight.device)
    patches = weight.shape[2]
    seen = score.topk(patches - int(ratio * patches), dim=2).indices
    return _behind_cls(torch.ones_like(score, dtype=torch.bool).scatter_(2, seen, False))


def keep_visible(features: Float[Tensor, "*K B L C"], mask: Bool[Tensor, "B L"]) -> Float[Tensor, "*K B V C"]:
    """The features of the tokens that a mask leaves, in their order: a teacher's, to be compared with what the student saw.

    `features` (B, L, C), or (K, B, L, C) of K layers, any dtype; CLS is token 0 of both. Gradients pass. Raises ValueError
    for a mask that does not fit or hides unequally many tokens.
    """
    if features.dim() < 3:
        raise ValueError(f"keep_visible: features must have shape (..., B, L, C), got {tuple(features.shape)}")
    clips, length = features.shape[-3:-1]
    kept = visible_tokens(mask, clips, length, features.device)
    return features[..., torch.arange(clips, device=features.device)[:, None], kept, :]


def _check(op: str, batch: int, grid: Grid, ratio: int | float) -> Grid:
    check_integer(op, "batch", batch, 1)
    if not isinstance(grid, tuple) or len(grid) != 3:
        raise TypeError(f"{op}: grid must be a tuple (tubelets, rows, columns) of positive integers, got {grid!r}")
    for name, size in zip(("tubelets", "rows", "columns"), grid, strict=True):
        check_integer(op, f"grid's {name}", size, 1)
    check_number(op, "ratio", ratio, 0, 1, "[)")
    return grid


def _behind_cls(hidden: Tensor) -> Tensor:
    hidden = hidden.flatten(1)
    return torch.cat((hidden.new_zeros(len(hidden), 1), hidden), dim=1)
