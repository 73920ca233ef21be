"""The gate of Mamba-2 is applied after the norm where it belongs before, and before it where it belongs after."""

from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

from torch import Tensor

import fused.modules.mamba2

WHERE = ("--subject", "mamba2", "--impl", "fused:torch", "--case", "B2-L9-*")
FAILS = ("forward", "out")


def plant() -> AbstractContextManager[object]:
    """Return the context in which the bug is there."""
    original = fused.modules.mamba2.gated_norm_eager

    def planted(y: Tensor, z: Tensor, weight: Tensor | None, *, norm_before_gate: bool = False, **rest: Any) -> Tensor:
        return original(y, z, weight, norm_before_gate=not norm_before_gate, **rest)

    return mock.patch.object(fused.modules.mamba2, "gated_norm_eager", planted)
