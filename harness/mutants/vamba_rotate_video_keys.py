"""The video's keys of Vamba are rotated by their places, though the text's queries are not."""

from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from fused.models.vamba.layer import VambaDecoderLayer
from fused.models.vamba.rotary import rotate

WHERE = ("--subject", "vamba", "--impl", "fused:torch", "--case", "*-layers=2-float32", "--case", "*-layers=2-autocast-*")
FAILS = ("forward", "logits")


def plant() -> AbstractContextManager[object]:
    """Return the context in which the bug is there."""
    original = VambaDecoderLayer.read_video

    def planted(self: Any, video: Tensor, shared: Any, memory: Any) -> Tensor:
        after = original(self, video, shared, memory)
        k, v = memory.video
        places = torch.arange(k.shape[2], device=k.device).expand(3, k.shape[0], -1)
        memory.video = rotate(k, self.angles(places, video.dtype), shared.backend), v
        return after

    return mock.patch.object(VambaDecoderLayer, "read_video", planted)
