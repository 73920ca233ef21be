"""Under torch.compile the convolution's bias is omitted."""

from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import fused.ops.causal_conv1d.api

WHERE = ("--subject", "conv", "--case", "B3-L7-*-reverse-state-*", "--check", "compile")
FAILS = ("compile", "grad bias*")


def plant() -> AbstractContextManager[object]:
    """Return the context in which the bug is there."""
    original = fused.ops.causal_conv1d.api.causal_conv1d

    def planted(x: Tensor, weight: Tensor, bias: Tensor | None = None, **rest: Any) -> tuple[Tensor, Tensor]:
        return original(x, weight, None if torch.compiler.is_compiling() else bias, **rest)

    return mock.patch.object(fused.ops.causal_conv1d.api, "causal_conv1d", planted)
