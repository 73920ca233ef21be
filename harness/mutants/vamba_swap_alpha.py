"""Alpha weighs cross-attention, where it has to weigh self-attention."""

from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

from torch import Tensor

from fused.models.vamba.layer import VambaDecoderLayer

WHERE = ("--subject", "vamba", "--impl", "fused:torch", "--case", "*-layers=2-float32", "--case", "*-layers=2-autocast-*")
FAILS = ("forward", "logits")


def plant() -> AbstractContextManager[object]:
    """Return the context in which the bug is there."""
    original = VambaDecoderLayer.balance

    def planted(self: Any, s: Tensor, c: Tensor | None) -> Tensor:
        return original(self, s, c) if c is None else original(self, c, s)

    return mock.patch.object(VambaDecoderLayer, "balance", planted)
