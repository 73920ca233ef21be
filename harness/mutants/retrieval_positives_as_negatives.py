"""Hard negatives are drawn from all others in the batch, those with the same id among them."""

from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

from torch import Tensor

from fused.train.objectives import losses

WHERE = ("--subject", "retrieval", "--check", "forward", "--impl", "fused:torch", "--case", "*-ranks-*")
FAILS = ("forward", "positives")


def plant() -> AbstractContextManager[object]:
    """Return the context in which the bug is there."""
    original = losses.matching_pairs

    def without_ids(similarities: Tensor, ids: Any = None, generator: Any = None) -> Any:
        return original(similarities, None, generator)

    return mock.patch.object(losses, "matching_pairs", without_ids)
