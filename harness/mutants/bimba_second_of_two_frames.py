"""A further layer of BIMBA reads the second of every two frames instead of the first."""

from contextlib import AbstractContextManager
from unittest import mock

from torch import Tensor

import fused.models.bimba.compressor

WHERE = ("--subject", "bimba", "--impl", "fused:torch", "--case", "*-layers=2-*")
FAILS = ("forward", "out")


def plant() -> AbstractContextManager[object]:
    """Return the context in which the bug is there."""

    def second(tokens: Tensor) -> Tensor:
        return tokens[:, 1::2]

    return mock.patch.object(fused.models.bimba.compressor, "every_second_frame", second)
