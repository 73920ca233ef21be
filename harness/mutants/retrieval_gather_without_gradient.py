"""The features of all processes are gathered, and no gradient goes back."""

from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

from torch import Tensor

from fused.train import gather

WHERE = ("--subject", "retrieval", "--check", "backward", "--impl", "fused:torch", "--case", "*-gathered-*")
FAILS = ("backward", "grad features")


def plant() -> AbstractContextManager[object]:
    """Return the context in which the bug is there."""
    original = gather.gather

    def cut(x: Tensor, *rest: Any) -> Tensor:
        return original(x, *rest).detach() + 0 * x

    return mock.patch.object(gather, "gather", cut)
