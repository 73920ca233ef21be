"""Processes that end with the one that started them."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.queues import SimpleQueue
from typing import Any

import torch


def pool(count: int, begin: Callable[..., None] | None = None, *args: Any) -> ProcessPoolExecutor:
    """Return `count` fresh processes, each of which first calls begin(*args)."""
    spawn = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(count, mp_context=spawn, initializer=_begin, initargs=(os.getpid(), begin, args))


def queue() -> "SimpleQueue[Any]":
    """Return a queue that the processes of a pool can be given when they begin."""
    return multiprocessing.get_context("spawn").SimpleQueue()


def processes_for(device: str) -> int:
    """Return how many processes share a device well.

    Small tensors use several cores badly; on a GPU the reference's loop waits for launches, and others use the time.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not device.startswith("cuda"):
        return min(8, cores)
    return max(1, min(8, cores // 2, int(torch.cuda.mem_get_info(device)[0] / 2**30 / 10)))


def end(workers: ProcessPoolExecutor) -> None:
    """End the processes at once, even if they are stuck."""
    for process in list((workers._processes or {}).values()):
        process.kill()  # they ignore SIGTERM
    workers.shutdown(wait=False, cancel_futures=True)


def _begin(parent: int, begin: Callable[..., None] | None, args: tuple[Any, ...]) -> None:
    """Run in a fresh process before its work."""
    follow(parent)
    if begin:
        begin(*args)


def follow(parent: int) -> None:
    """Leave Ctrl-C and SIGTERM, which a terminal and `timeout` send to all, to the parent process; end when it does."""
    for which in (signal.SIGINT, signal.SIGTERM):
        signal.signal(which, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    """Wait for the end of the parent, for a process whose parent was killed would wait for work forever; then end."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
