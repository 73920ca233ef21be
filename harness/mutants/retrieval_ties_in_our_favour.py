"""Of candidates with equal scores the right one is ranked first, so that a constant score finds everything."""

from contextlib import AbstractContextManager
from unittest import mock

from torch import Tensor

from fused.models.retrieval import ranking

WHERE = ("--subject", "retrieval", "--check", "forward", "--impl", "fused:torch", "--case", "*-ranks-*")
FAILS = ("forward", "* to *")


def plant() -> AbstractContextManager[object]:
    """Return the context in which the bug is there."""
    return mock.patch.object(ranking, "ranks", bug)


def bug(scores: Tensor, right: Tensor) -> Tensor:
    """Return the number of candidates with a higher score than the best right one."""
    best = scores.masked_fill(~right, -float("inf")).amax(dim=1, keepdim=True)
    return (scores > best).sum(dim=1)
