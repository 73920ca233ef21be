"""The two directions' weights are swapped: the backward scan runs with the forward ones."""

from contextlib import AbstractContextManager
from unittest import mock

from fused.modules.mamba import Mamba
from fused.ops.shapes import DirectionWeights

WHERE = ("--subject", "mixer", "--case", "B2-L9-*", "--impl", "fused:torch")
FAILS = ("forward", "out")


def plant() -> AbstractContextManager[object]:
    """Return the context in which the bug is there."""
    original = Mamba.directions

    def swapped(self: Mamba, squeeze: bool = True) -> tuple[DirectionWeights, ...]:
        return original(self, squeeze)[::-1]

    return mock.patch.object(Mamba, "directions", swapped)
