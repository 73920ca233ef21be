"""Which words masked language modelling hides, and what stands in their place (BERT, arXiv 1810.04805, 3.1)."""

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from fused.rules import check_integer, check_number
from fused.train.objectives.losses import IGNORED
from fused.train.random import checked


def mask_words(
    words: Int[Tensor, "B N"], mask_id: int, vocabulary: int, kept: Bool[Tensor, "B N"] | None = None,
    ratio: int | float = 0.5, generator: torch.Generator | None = None,
) -> tuple[Int[Tensor, "B N"], Int[Tensor, "B N"]]:  # fmt: skip
    """(words to show, labels), both int64 (B, N): every word is chosen with probability `ratio` in [0, 1], and its label is
    the word; of the chosen 80 % show `mask_id`, 10 % any word of the `vocabulary` (its size), 10 % themselves.

    `words` is int64. Where `kept` is True (padding, separators) nothing is chosen. All others have the label -100 of
    `masked_language_loss`. VideoMamba's text model takes ratio 0.5. `generator`: see `fused.train.random`.

    Raises ValueError or TypeError for what does not fit.
    """
    check_number("mask_words", "ratio", ratio, 0, 1)
    check_integer("mask_words", "vocabulary", vocabulary, 1)
    check_integer("mask_words", "mask_id", mask_id, 0, vocabulary - 1)
    if words.dtype != torch.int64 or words.dim() != 2:
        raise ValueError(f"mask_words: words must be int64 (B, N), got {words.dtype} {tuple(words.shape)}")
    if kept is not None and (kept.dtype != torch.bool or kept.shape != words.shape):
        came = f"{kept.dtype} {tuple(kept.shape)}"
        raise ValueError(f"mask_words: kept must be bool {tuple(words.shape)} like words, or None, got {came}")
    choice, fate = torch.rand(2, *words.shape, generator=checked(generator), device="cpu").to(words.device)
    other = torch.randint(vocabulary, words.shape, generator=generator, device="cpu").to(words.device)
    chosen = choice < ratio
    if kept is not None:
        chosen &= ~kept
    shown = torch.where(fate < 0.8, mask_id, torch.where(fate < 0.9, other, words))
    return torch.where(chosen, shown, words), torch.where(chosen, words, IGNORED)
