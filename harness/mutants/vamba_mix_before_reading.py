"""Text of a layer of Vamba reads the video after the layer's mixer, also that of the last layer, which has no effect."""

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
        mixed, _ = self.vision_mixer(video, shared.seq_idx, shared.backend)
        original(self, mixed, shared, memory)
        return video

    return mock.patch.object(VambaDecoderLayer, "read_video", planted)
