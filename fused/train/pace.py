"""The speed of a training between two lines of its log."""

import time
from collections.abc import Sequence

from fused.train.prefetch import Wait


class Pace:
    """Clips a second, and the share of the time that waited for data, since it was made."""

    def __init__(self) -> None:
        self._start, self._clips, self._waited = time.perf_counter(), 0, 0.0

    def add(self, clips: int, waits: Sequence[Wait]) -> tuple[float, float]:
        """Count a step that is done, and return the clips a second and the share."""
        self._clips += clips
        self._waited += sum(wait.seconds() for wait in waits)
        seconds = time.perf_counter() - self._start
        return self._clips / seconds, min(self._waited / seconds, 1.0)
