"""`forward_chunked` starts the backward direction anew in every chunk: what only an approximation may do."""

from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

from torch import Tensor

import fused.chunked.layer

WHERE = ("--subject", "videomamba", "--case", "B2-T2-S32-D32-L9-layernorm-*", "--check", "forward_chunked")
FAILS = ("forward_chunked", "grad *_b*")


def plant() -> AbstractContextManager[object]:
    """Return the context in which the bug is there."""
    original = fused.chunked.layer.scan_chunk

    def planted(spec: Any, weights: Any, x: Tensor, state: Any, reverse: bool, *gate: Any) -> Any:
        y, (conv_state, ssm_state) = original(spec, weights, x, state, reverse, *gate)
        return y, (conv_state * 0, ssm_state * 0) if reverse else (conv_state, ssm_state)

    return mock.patch.object(fused.chunked.layer, "scan_chunk", planted)
