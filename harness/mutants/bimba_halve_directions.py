"""The directions of BIMBA are averaged instead of added."""

from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

from torch import Tensor

from fused.models.bimba import query_mixer

WHERE = ("--subject", "bimba", "--impl", "fused:torch", "--case", "B2-F3-H2-*-D16-L24-*")
FAILS = ("forward", "out")


def plant() -> AbstractContextManager[object]:
    """Return the context in which the bug is there."""
    original = query_mixer.one_direction_eager

    def halved(*inputs: Any, **options: Any) -> tuple[Tensor, Any]:
        y, state = original(*inputs, **options)
        return y / 2, state

    return mock.patch.object(query_mixer, "one_direction_eager", halved)
