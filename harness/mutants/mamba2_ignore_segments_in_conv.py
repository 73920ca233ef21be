"""The convolution of Mamba-2 ignores the edges of segments: their first tokens read the last inputs of the segment before."""

from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import fused.ops.causal_conv1d.api

WHERE = ("--subject", "mamba2", "--impl", "fused:torch", "--case", "B2-L9-*-segments-*")
FAILS = ("forward", "out")


def plant() -> AbstractContextManager[object]:
    """Return the context in which the bug is there."""
    original = fused.ops.causal_conv1d.api.causal_conv1d_packed

    def planted(*tensors: Any, seq_idx: Tensor, **rest: Any) -> tuple[Tensor, Tensor]:
        return original(*tensors, seq_idx=torch.zeros_like(seq_idx), **rest)

    return mock.patch.object(fused.ops.causal_conv1d.api, "causal_conv1d_packed", planted)
