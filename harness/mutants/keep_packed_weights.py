"""In inference a mixer reads weights that were packed in its first call: no later step or loading reaches them."""

from contextlib import AbstractContextManager
from unittest import mock

import torch
from torch.utils.weak import WeakIdKeyDictionary

from fused.modules.mamba import Mamba
from fused.ops.shapes import DirectionWeights

WHERE = ("--subject", "videomamba", "--case", "*-for=compile-*", "--check", "compile")
FAILS = ("compile", "logits*after a step*")


def plant() -> AbstractContextManager[object]:
    """Return the context in which the bug is there."""
    original, packed = Mamba.directions, WeakIdKeyDictionary()

    def planted(self: Mamba) -> tuple[DirectionWeights, ...]:
        if torch.is_grad_enabled():
            return original(self)
        if self not in packed:
            packed[self] = tuple(
                weights._replace(**{k: w.detach().clone() for k, w in weights._asdict().items() if w is not None})
                for weights in original(self)
            )
        return packed[self]

    return mock.patch.object(Mamba, "directions", planted)
