"""Ctrl-C and a scheduler's SIGTERM, answered between two steps of a training, also where they are sent to all its processes."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Seconds in which further signals count as the same one: `timeout` sends its signal to the process and then to its group.
REPEATED = 1.0
WATCH_EVERY = 1.0  # seconds between two looks whether the parent process is still there


class Interrupt:
    """A context in which the first signal only sets `requested`.

    A second one, at least a second later, ends the process as without the context.
    """

    def __init__(self) -> None:
        self.requested = False
        self._requested_at = 0.0
        self._previous_handlers: dict[int, Any] = {}

    def __enter__(self) -> "Interrupt":
        self._previous_handlers = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """Note the first signal, and pass on the second one to the previous handler."""
        if not self.requested:
            self.requested, self._requested_at = True, time.monotonic()
        elif time.monotonic() - self._requested_at >= REPEATED:
            self.__exit__()
            signal.raise_signal(number)


@contextmanager
def blocked_signals() -> Iterator[None]:
    """Let SIGINT and SIGTERM wait until the block ends. Processes that start in the block start with them blocked."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave_signals_to_parent(worker: int) -> None:
    """Make data-loading worker number `worker`, the calling process, deaf to SIGINT, and to SIGTERM unless its parent sends it.

    A terminal, `timeout`, torchrun and schedulers signal every process of a group. The training process answers, and needs its
    workers for the rest of its step. It ends them with SIGTERM where it does not come to stop them otherwise. A worker also
    ends when its parent is gone. The start method has to be fork, the default of Linux: with others a worker may have threads
    by now that SIGTERM is delivered to.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    creator = multiprocessing.parent_process()
    parents = {os.getppid()} | ({creator.pid} if creator is not None else set())  # two with the start method forkserver
    threading.Thread(target=_end_with_parent, args=(os.getppid(), parents), daemon=True).start()


def _end_with_parent(parent: int, senders: set[int | None]) -> None:
    """Wait until one of `senders` sends SIGTERM or process `parent` is gone; then end this process."""
    while os.getppid() == parent:
        received = signal.sigtimedwait({signal.SIGTERM}, WATCH_EVERY)
        if received is not None and received.si_pid in senders:
            break
    os._exit(0)  # PyTorch reports another code of a worker as a failure
