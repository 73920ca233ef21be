"""The results of text to video are said to be those of video to text, and the reverse."""

from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

from fused.models.retrieval import ranking

WHERE = ("--subject", "retrieval", "--check", "forward", "--impl", "fused:torch", "--case", "*-ranks-*")
FAILS = ("forward", "* to *")


def plant() -> AbstractContextManager[object]:
    """Return the context in which the bug is there."""
    original = ranking.both_directions

    def swapped(*arguments: Any) -> Any:
        first, second = original(*arguments)
        return second, first

    return mock.patch.object(ranking, "both_directions", swapped)
