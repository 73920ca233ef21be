"""Ctrl-C, and the SIGTERM of a scheduler, as a question that a training asks between two steps."""

import os
import signal
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupt:
    """While it is entered, the first signal only sets `asked`; the second ends the process as it would have without."""

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Interrupt":
        self._owner = os.getpid()
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._owner:  # a worker that decodes, made with this handler: the training ends it
            os._exit(128 + number)
        if self.asked:
            self.__exit__()
            signal.raise_signal(number)
        self.asked = True
