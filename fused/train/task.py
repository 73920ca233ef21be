"""The base of tasks: a module that holds its student, and returns the loss of a batch.

`prepare` turns a batch into the arguments of `forward`: mixed clips, masks, the teacher's output. `forward` returns the loss,
and everything with a gradient happens in it, so that a CUDA graph can hold it.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fused.models.retrieval.model import VideoTextRetrieval
from fused.models.videomamba.model import VideoMamba, VideoMambaEncoder

Student = VideoMamba | VideoMambaEncoder | VideoTextRetrieval
Metrics = dict[str, Tensor]  # scalars () for the log


class Task(nn.Module):
    """A student and its training objective. `forward` returns the loss () and further metrics."""

    student: Student
    unit = "clips"  # that are counted

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The modules whose parameters are gathered one after another where processes share them."""
        student: Any = self.student
        return list(student.layers)

    def load_weights(self, device: torch.device) -> None:
        """Put weights that are still on the meta device, whole or sharded, on `device`."""

    def encode(self, labels: Tensor) -> Tensor:
        """Return labels, int64 (B,) on the CPU, as `prepare` takes them: what has to look at them is done before the GPU."""
        return labels

    def prepare(self, clips: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Return the arguments of `forward`, none of which requires a gradient.

        `clips` is (B, C, T, H, W), `labels` int64 (B,) or as from `encode`, `generator` a CPU generator for all random choices.
        """
        raise NotImplementedError

    def logits(self, clips: Tensor) -> Tensor:
        """Return class logits (B, classes) for clips (B, C, T, H, W). Only tasks with classes have them."""
        raise NotImplementedError
