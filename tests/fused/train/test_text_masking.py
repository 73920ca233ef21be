"""Words are masked as in BERT, and the labels are the original words."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fused.train import mask_words

MASK, SIZE = 103, 1000


def sample(seed: int = 0, ratio: float = 0.5) -> tuple[Tensor, ...]:
    words = torch.arange(200, 600).repeat(100, 1)
    kept = torch.zeros_like(words, dtype=torch.bool)
    kept[:, ::4] = True
    return words, kept, *mask_words(words, MASK, SIZE, kept, ratio, torch.Generator().manual_seed(seed))


def test_shares_and_labels() -> None:
    words, kept, shown, labels = sample()
    chosen = labels != -100
    assert torch.equal(labels[chosen], words[chosen]) and torch.equal(shown[~chosen], words[~chosen])
    assert not chosen[kept].any()

    def likely(count: torch.Tensor, draws: int, share: float) -> bool:
        return abs(int(count) - draws * share) <= 5 * (draws * share * (1 - share)) ** 0.5

    assert likely(chosen.sum(), int((~kept).sum()), 0.5)
    n = int(chosen.sum())
    masked, same = shown[chosen] == MASK, shown[chosen] == words[chosen]
    assert likely(masked.sum(), n, 0.8 + 0.1 / SIZE) and likely(same.sum(), n, 0.1 + 0.1 / SIZE)
    other = shown[chosen][~masked & ~same]
    assert other.min() < SIZE / 10 and SIZE * 0.9 < other.max() < SIZE, "from the whole vocabulary"


def test_all_none_and_seeds() -> None:
    words, kept, shown, labels = sample(ratio=0)
    assert torch.equal(shown, words) and (labels == -100).all()
    words, kept, shown, labels = sample(ratio=1)
    assert torch.equal(labels != -100, ~kept)
    once, again, other = (sample(seed)[2] for seed in (1, 1, 2))
    assert torch.equal(once, again) and not torch.equal(once, other)


WORDS = torch.zeros(2, 3, dtype=torch.int64)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("arguments", "error", "wanted"),
    [
        ((WORDS.int(), 1, 9), ValueError, r"words must be int64 \(B, N\), got torch.int32 \(2, 3\)"),
        ((WORDS[0], 1, 9), ValueError, r"words must be int64 \(B, N\), got torch.int64 \(3,\)"),
        ((WORDS, 9, 9), ValueError, "mask_id must be an integer from 0 to 8, got 9"),
        ((WORDS, 1, 0), ValueError, "vocabulary must be an integer from 1 up, got 0"),
        ((WORDS, 1, 9, WORDS), ValueError, r"kept must be bool \(2, 3\) like words, or None, got torch.int64 \(2, 3\)"),
        ((WORDS, 1, 9, None, 1.5), ValueError, r"ratio must be a number in \[0, 1\], got 1.5"),
        ((WORDS, 1, 9, None, 0.5, 3), TypeError, "generator must be a torch.Generator"),
    ],
)
def test_errors(arguments: tuple[Any, ...], error: type[Exception], wanted: str) -> None:
    with pytest.raises(error, match=wanted):
        mask_words(*arguments)
