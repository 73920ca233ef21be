"""The layers that see words only read the video too, by the attention of a later layer."""

from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

from torch import Tensor

from fused.models.retrieval.text_encoder import SplitBert

WHERE = ("--subject", "retrieval", "--check", "forward", "--impl", "fused:torch", "--case", "*-fusion-*")
FAILS = ("forward", "match")


def plant() -> AbstractContextManager[object]:
    """Return the context in which the bug is there."""
    original = SplitBert.fusion

    def reading(self: Any, text: Tensor, visible: Tensor, video: Tensor) -> Tensor:
        for _ in self.layers[: self.config.fusion_layer]:
            text = self.layers[-1].crossattention(text, video, None)
        return original(self, text, visible, video)

    return mock.patch.object(SplitBert, "fusion", reading)
