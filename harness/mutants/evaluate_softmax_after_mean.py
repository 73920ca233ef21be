"""The logits of a video's views are averaged before the softmax."""

from contextlib import AbstractContextManager
from unittest import mock

import fused.evaluate.run

WHERE = ("--subject", "evaluation", "--check", "forward")
FAILS = ("forward", "probabilities")


def plant() -> AbstractContextManager[object]:
    """Return the context in which the bug is there."""
    return mock.patch.object(fused.evaluate.run, "merge_views", lambda logits: logits.float().mean(0).softmax(-1))
