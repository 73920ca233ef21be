"""The layers that read the video see the padding of the text too."""

from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from fused.models.retrieval.text_encoder import SplitBert

WHERE = ("--subject", "retrieval", "--check", "forward", "--impl", "fused:torch", "--case", "*-fusion-*")
FAILS = ("forward", "words")


def plant() -> AbstractContextManager[object]:
    """Return the context in which the bug is there."""
    original = SplitBert.fusion

    def seeing(self: Any, text: Tensor, visible: Tensor, video: Tensor) -> Tensor:
        return original(self, text, torch.ones_like(visible), video)

    return mock.patch.object(SplitBert, "fusion", seeing)
