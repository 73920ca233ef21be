"""`forward_chunked` loses gradients where chunks meet: none goes back through the states between them."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

from torch import Tensor

import fused.chunked.layer

WHERE = ("--subject", "videomamba", "--case", "B2-T2-S32-D32-L9-unfused-*", "--check", "forward_chunked")
FAILS = ("forward_chunked", "grad clip*")


def plant() -> AbstractContextManager[object]:
    """Return the context in which the bug is there."""
    original = fused.chunked.layer.chunk_gradients

    def planted(w: Any, outputs: Sequence[Tensor], grads: Sequence[Tensor], *others: Any) -> list[Tensor]:
        return original(w, outputs[:1], grads[:1], *others)

    return mock.patch.object(fused.chunked.layer, "chunk_gradients", planted)
