"""Work in background threads that a later call takes, such as the compilation of a kernel that will soon be needed.

The threads end with the process, which waits for work that runs. A fork waits for it too: a child has none of its parent's
threads, and a library that is in use by one of them can stay locked in the child.
"""

import os
import threading
from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

MAX_THREADS = 4
_lock = threading.Lock()
_futures: dict[Hashable, Future[Any]] = {}
_pool: ThreadPoolExecutor | None = None


def start(key: Hashable, work: Callable[[], Any]) -> None:
    """Start `work()` in a background thread, unless work with this key was started and not taken."""
    global _pool
    with _lock:
        if key in _futures:
            return
        if _pool is None:
            _pool = ThreadPoolExecutor(MAX_THREADS, "fused-background")
        try:
            _futures[key] = _pool.submit(work)
        except RuntimeError:  # the interpreter ends, or the system has no thread left: `take` does the work
            pass


def take(key: Hashable, work: Callable[[], Any]) -> Any:
    """Return the result of the work that was started with `key`, waiting for it, else of `work()` in this thread.

    Work that failed is done again here, so that its error is raised to the caller that needs the result.
    """
    with _lock:
        future = _futures.pop(key, None)
    if future is None or future.cancel() or future.exception() is not None:
        return work()
    return future.result()


def _before_fork() -> None:
    _lock.acquire()
    wait(_futures.values())


def _after_fork_in_child() -> None:
    global _pool
    _pool = None
    _lock.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_lock.release, after_in_child=_after_fork_in_child)
