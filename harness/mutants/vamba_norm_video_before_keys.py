"""Video tokens of Vamba are normed before they become keys and values, without the option that says so."""

from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

from torch import Tensor

from fused.models.vamba.layer import VambaDecoderLayer

WHERE = ("--subject", "vamba", "--impl", "fused:torch", "--case", "*-layers=2-float32", "--case", "*-layers=2-autocast-*")
FAILS = ("forward", "logits")


def plant() -> AbstractContextManager[object]:
    """Return the context in which the bug is there."""
    original = VambaDecoderLayer.read_video

    def planted(self: Any, video: Tensor, shared: Any, memory: Any) -> Tensor:
        original(self, self.input_layernorm(video, shared.backend), shared, memory)
        return video

    return mock.patch.object(VambaDecoderLayer, "read_video", planted)
