"""Ctrl-C and a scheduler's SIGTERM, noted and answered between two steps of a training."""

import os
import signal
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupt:
    """A context in which the first signal only sets `requested`; the second one ends the process as without the context."""

    def __init__(self) -> None:
        self.requested = False
        self._previous_handlers: dict[int, Any] = {}

    def __enter__(self) -> "Interrupt":
        self._owner = os.getpid()
        self._previous_handlers = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """Note the first signal, and pass on the second one to the previous handler."""
        if os.getpid() != self._owner:  # a data-loading worker, forked with this handler: the training process ends it
            os._exit(128 + number)
        if self.requested:
            self.__exit__()
            signal.raise_signal(number)
        self.requested = True
