"""Random word masks of masked language modelling (BERT, arXiv 1810.04805, section 3.1)."""

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from fused.rules import check_integer, check_number
from fused.train.objectives.losses import IGNORE_INDEX
from fused.train.random import check_generator


def mask_words(
    words: Int[Tensor, "B N"], mask_id: int, vocabulary: int, kept: Bool[Tensor, "B N"] | None = None,
    ratio: int | float = 0.5, generator: torch.Generator | None = None,
) -> tuple[Int[Tensor, "B N"], Int[Tensor, "B N"]]:  # fmt: skip
    """Return (masked words, labels), both int64 (B, N).

    Every word is selected with probability `ratio` in [0, 1]. Of the selected words 80 % become `mask_id`, 10 % a random word
    of the `vocabulary` (its size), and 10 % stay. The label of a selected word is the word itself; all others have the label
    -100, which `masked_language_loss` ignores.

    `words` is int64 (B, N). Where `kept` is True (padding, separators) no word is selected. VideoMamba's text model takes
    ratio 0.5. `generator`: see `fused.train.random`. Raises ValueError or TypeError for arguments that do not fit.
    """
    check_number("mask_words", "ratio", ratio, 0, 1)
    check_integer("mask_words", "vocabulary", vocabulary, 1)
    check_integer("mask_words", "mask_id", mask_id, 0, vocabulary - 1)
    if words.dtype != torch.int64 or words.dim() != 2:
        raise ValueError(f"mask_words: words must be int64 (B, N), got {words.dtype} {tuple(words.shape)}")
    if kept is not None and (kept.dtype != torch.bool or kept.shape != words.shape):
        found = f"{kept.dtype} {tuple(kept.shape)}"
        raise ValueError(f"mask_words: kept must be bool {tuple(words.shape)} like words, or None, got {found}")
    check_generator(generator)
    selection, replacement = torch.rand(2, *words.shape, generator=generator, device="cpu").to(words.device)
    random_words = torch.randint(vocabulary, words.shape, generator=generator, device="cpu").to(words.device)
    selected = selection < ratio
    if kept is not None:
        selected &= ~kept
    replaced = torch.where(replacement < 0.8, mask_id, torch.where(replacement < 0.9, random_words, words))
    return torch.where(selected, replaced, words), torch.where(selected, words, IGNORE_INDEX)
