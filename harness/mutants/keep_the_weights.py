"""in_proj multiplies with a copy of its weight, made when that is first used: no step of an optimiser reaches it."""

from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from fused.modules.mamba import Mamba

WHERE = ("--case", "*-for=convergence-*", "--check", "convergence")
FAILS = ("convergence", "free run")


def plant() -> AbstractContextManager[object]:
    """Return the context in which the bug is there. Gradients go to the weight itself, and are those of the copy."""
    original, copies = Mamba.__getattr__, WeakTensorKeyDictionary()

    def stale(linear: nn.Linear) -> nn.Linear:
        weight = linear.weight
        copy = copies.setdefault(weight, weight.detach().clone())
        found = nn.Linear(linear.in_features, linear.out_features, device="meta")
        del found.weight, found.bias
        found.weight, found.bias = weight - weight.detach() + copy, linear.bias
        return found

    def planted(self: Mamba, name: str) -> Any:
        found: Any = original(self, name)
        return stale(found) if name == "in_proj" else found

    return mock.patch.object(Mamba, "__getattr__", planted)
