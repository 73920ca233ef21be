"""The gradient of D is added to a buffer that nothing clears: from the second step on it holds those of earlier steps too."""

from contextlib import AbstractContextManager
from unittest import mock

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from fused.modules.mamba import Mamba
from fused.ops.shapes import DirectionWeights

WHERE = ("--case", "*-for=convergence-*", "--check", "convergence")
FAILS = ("convergence", "free run")


def plant() -> AbstractContextManager[object]:
    """Return the context in which the bug is there."""
    original, sums = Mamba.directions, WeakTensorKeyDictionary()

    def summed(D: Tensor) -> Tensor:
        def add(gradient: Tensor) -> Tensor:
            sums[D] = sums.get(D, 0) + gradient
            return sums[D]

        used = D.view_as(D)
        if used.requires_grad:
            used.register_hook(add)
        return used

    def planted(self: Mamba, squeeze: bool = True) -> tuple[DirectionWeights, ...]:
        return tuple(weights._replace(D=summed(weights.D)) for weights in original(self, squeeze))

    return mock.patch.object(Mamba, "directions", planted)
