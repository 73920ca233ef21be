"""Clips are dropped by the random mask of the first step, as a graph would that was captured with it as a constant."""

from contextlib import AbstractContextManager
from unittest import mock

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from fused.modules.norm import DropPath

WHERE = ("--subject", "videomamba", "--case", "*-for=compile-*", "--check", "compile")
FAILS = ("compile", "outputs of * random calls")


def plant() -> AbstractContextManager[object]:
    """Return the context in which the bug is there."""
    original, masks = DropPath.forward, WeakIdKeyDictionary()

    def planted(self: DropPath, x: Tensor) -> Tensor:
        ones = x.new_ones((x.shape[0],) + (1,) * (x.dim() - 1))
        mask = masks.setdefault(self, {}).setdefault(ones.shape, original(self, ones))
        return x * mask.to(x)

    return mock.patch.object(DropPath, "forward", planted)
