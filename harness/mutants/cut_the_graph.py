"""A state is carried without its graph: gradients end at the start of every chunk."""

from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import fused.models.videomamba.backbone
from fused.modules.state import detach_state

WHERE = ("--subject", "videomamba", "--check", "chunks", "--impl", "fused:torch", "--case", "*readout=last*")
FAILS = ("chunks", "grad clip*")


def plant() -> AbstractContextManager[object]:
    """Return the context in which the bug is there."""
    original = fused.models.videomamba.backbone.unpack

    def cut(*arguments: Any) -> Any:
        return detach_state(original(*arguments))

    return mock.patch.object(fused.models.videomamba.backbone, "unpack", cut)
