"""The gate of a query of BIMBA is that of the next query."""

from contextlib import AbstractContextManager
from unittest import mock

from torch import Tensor

from fused.models.bimba import query_mixer
from fused.models.bimba.interleave import Places
from fused.modules.mamba import Mamba

WHERE = ("--subject", "bimba", "--impl", "fused:torch", "--case", "B2-F3-H2-*-D16-L24-*")
FAILS = ("forward", "out")


def plant() -> AbstractContextManager[object]:
    """Return the context in which the bug is there."""
    original = query_mixer.mix_eager

    def shifted(mixer: Mamba, sequence: Tensor, queries: Tensor, places: Places, operators: str) -> Tensor:
        return original(mixer, sequence, queries.roll(-1, 1), places, operators)

    return mock.patch.object(query_mixer, "mix_eager", shifted)
