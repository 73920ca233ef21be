"""Queries of BIMBA stand before their stretch of tokens instead of behind it."""

from contextlib import AbstractContextManager

import torch
from torch import Tensor

from harness.mutants import places_with

WHERE = ("--subject", "bimba", "--impl", "fused:torch", "--case", "B2-F3-*-D16-L*")
FAILS = ("forward", "out")


def plant() -> AbstractContextManager[None]:
    """Return the context in which the bug is there."""
    return places_with(bug)


def bug(places: Tensor, num_tokens: int) -> Tensor:
    """Return the places behind the query before, from 0 on."""
    return torch.cat((places.new_zeros(1), places[:-1] + 1))
