"""A video of Vamba gets the keys and values of the video of the same size that was encoded before it."""

from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

from fused.models.vamba.prefill import PairStore

WHERE = ("--subject", "vamba", "--check", "chunks", "--impl", "fused:torch", "--case", "*-stream-*")
FAILS = ("chunks", "values_*")


def plant() -> AbstractContextManager[object]:
    """Return the context in which the bug is there."""
    original = PairStore.finish
    kept: dict[Any, Any] = {}

    def planted(self: Any) -> Any:
        found = original(self)
        return kept.setdefault((found[0][0].shape, found[0][0].dtype), found)

    return mock.patch.object(PairStore, "finish", planted)
