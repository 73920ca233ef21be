"""The decays A are taken from A_log when a parameter is first used, and kept: no step of an optimiser reaches them."""

from contextlib import AbstractContextManager
from unittest import mock

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from fused.mixer import Direction, Mamba

WHERE = ("--case", "*-for=convergence-*", "--check", "convergence")


def plant() -> AbstractContextManager[object]:
    """The context in which the bug is there."""
    honest, kept = Mamba._directions, WeakTensorKeyDictionary()

    def first(A_log: Tensor) -> Tensor:
        return A_log - A_log.detach() + kept.setdefault(A_log, A_log.detach().clone())

    def planted(self: Mamba) -> tuple[Direction, ...]:
        return tuple(own._replace(A_log=first(own.A_log)) for own in honest(self))

    return mock.patch.object(Mamba, "_directions", planted)
