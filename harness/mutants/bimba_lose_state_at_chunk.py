"""The backward direction of BIMBA starts from zero at every edge of chunks."""

from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

from torch import Tensor

from fused.models.bimba import chunked

WHERE = ("--subject", "bimba", "--impl", "fused:torch", "--check", "forward_chunked", "--case", "B2-F3-*-L59-*")
FAILS = ("forward_chunked", "*chunks of 1, *")


def plant() -> AbstractContextManager[object]:
    """Return the context in which the bug is there."""
    original = chunked.scan_chunk

    def forgetful(layer: Any, chunk: chunked.Chunk, direction: int, state: Any, backend: str) -> tuple[Tensor, Any]:
        return original(layer, chunk, direction, None if direction else state, backend)

    return mock.patch.object(chunked, "scan_chunk", forgetful)
