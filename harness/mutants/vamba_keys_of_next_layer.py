"""From a cache, a layer of Vamba reads the video by the keys and values of the layer above."""

from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import fused.models.vamba.model

WHERE = ("--subject", "vamba", "--check", "chunks", "--impl", "fused:torch", "--case", "*-decode-*")
FAILS = ("chunks", "grad model.layers.*.cross_attn.*")


def plant() -> AbstractContextManager[object]:
    """Return the context in which the bug is there."""
    original = fused.models.vamba.model.layer_pairs
    calls = 0

    def planted(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        found = original(*arguments)
        return [*found[1:], found[0]] if calls % 2 else found  # the video's come first, then the text's

    return mock.patch.object(fused.models.vamba.model, "layer_pairs", planted)
