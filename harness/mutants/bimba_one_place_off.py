"""At a broken ratio of tokens to queries, the first query of BIMBA stands one place too early."""

from contextlib import AbstractContextManager

from torch import Tensor

from harness.mutants import places_with

WHERE = ("--subject", "bimba", "--impl", "fused:torch", "--case", "B2-F3-H3-W5-*")
FAILS = ("forward", "out")


def plant() -> AbstractContextManager[None]:
    """Return the context in which the bug is there."""
    return places_with(bug)


def bug(places: Tensor, num_tokens: int) -> Tensor:
    """Return the places with the first of them moved."""
    if num_tokens % len(places) == 0:
        return places
    moved = places.clone()
    moved[0] -= 1
    return moved
