"""The last frame of each segment of a video is taken, in every clip."""

from contextlib import AbstractContextManager
from unittest import mock

from fused.io.views import UPSTREAM_FRAMES

WHERE = ("--subject", "evaluation", "--check", "forward")
FAILS = ("forward", "probabilities")


def plant() -> AbstractContextManager[object]:
    """Return the context in which the bug is there."""

    def planted(total: int, frames: int, view: int, views: int) -> list[int]:
        segment = (total - 1) / frames
        return [min(round(segment * (i + 1)), total - 1) for i in range(frames)]

    return mock.patch.dict(UPSTREAM_FRAMES, sparse=planted)
