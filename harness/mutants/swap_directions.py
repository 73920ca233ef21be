"""The two directions' weights are swapped: the backward scan runs with the forward ones."""

from contextlib import AbstractContextManager
from unittest import mock

from fused.modules.mamba import Direction, Mamba

WHERE = ("--subject", "mixer", "--case", "B2-L9-*", "--impl", "fused:torch")


def plant() -> AbstractContextManager[object]:
    """Return the context in which the bug is there."""
    original = Mamba._directions

    def swapped(self: Mamba) -> tuple[Direction, ...]:
        own = original(self)
        return tuple(one._replace(reverse=other.reverse) for one, other in zip(own, own[::-1], strict=True))

    return mock.patch.object(Mamba, "_directions", swapped)
