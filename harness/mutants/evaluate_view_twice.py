"""The first view of a video counts twice."""

from contextlib import AbstractContextManager
from unittest import mock

import torch
from torch import Tensor

import fused.evaluate.run

WHERE = ("--subject", "evaluation", "--check", "forward")
FAILS = ("forward", "probabilities")


def plant() -> AbstractContextManager[object]:
    """Return the context in which the bug is there."""
    merge = fused.evaluate.run.merge_views

    def planted(logits: Tensor) -> Tensor:
        return merge(torch.cat((logits, logits[:1])))

    return mock.patch.object(fused.evaluate.run, "merge_views", planted)
