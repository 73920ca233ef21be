"""The visible tokens of a masked student, and the teacher's features of them that it learns."""

import torch
from torch import Tensor

from fused.models.videomamba.embedding import visible_tokens
from fused.train.models import Teacher
from fused.train.objectives.masks import MASKS, attention_mask, keep_visible


def visible_targets(
    teacher: Teacher, clips: Tensor, kind: str, ratio: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return indices (B, V) of visible tokens, and the teacher's features (K, B, V, C) of them, for clips (B, C, T, H, W).

    `kind` is a name in MASKS, or "attention"; the share `ratio` of tokens is hidden.
    """
    features, attention = teacher.forward(clips)
    if kind == "attention":
        assert attention is not None
        mask = attention_mask(attention, ratio, generator)
    else:
        mask = MASKS[kind](len(clips), teacher.grid, ratio, generator)
    return visible_tokens(mask, len(clips), features.shape[-2], features.device), keep_visible(features, mask)
