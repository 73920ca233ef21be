"""A process that times one entry: an error that kills it affects no other entry."""

import contextlib
import gc
import importlib
import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import torch

from fused import backends
from harness.bench.clock import Call, Clock
from harness.bench.power import Power
from harness.records.speed import Entry, Point
from harness.runs.workers import follow

WARM = 3
HOST_SAMPLES = 2  # of the host's time, in each turn of a loop: other work on the host comes and goes
MIN_TOKENS_PER_SECOND = 50_000  # a call of many tokens may take longer than is allowed to all


class EntryFailed(RuntimeError):
    """The entry cannot be timed at this point; `status` is "oom", "timeout" or "error"."""

    def __init__(self, status: str, reason: str) -> None:
        super().__init__(reason)
        self.status, self.reason = status, reason


class Worker:
    """A worker process, started at the first request and again after it died.

    A call that takes more than `slowest` seconds fails, unless it is of very many tokens.
    """

    def __init__(self, entry: Entry, device: str, threads: int, slowest: float = 10.0) -> None:
        self.entry, self._device, self._threads, self._slowest = entry, device, threads, slowest
        self._process: Any = None
        self._pipe: Connection | None = None

    def ask(self, request: str, *arguments: Any, timeout: float) -> Any:
        """Return the answer of the process within `timeout` seconds. Raises EntryFailed."""
        self.start()
        assert self._pipe is not None
        try:
            self._pipe.send((request, *arguments))
            if not self._pipe.poll(timeout):
                raise EntryFailed("timeout", f"no answer within {timeout:.0f} s")
            status, answer = self._pipe.recv()
        except (EOFError, OSError) as error:
            self._process.join(10)  # the pipe closes a moment before the process has ended
            code = self._process.exitcode
            self.end()
            raise EntryFailed("error", f"its process died (exit code {code})") from error
        except EntryFailed:
            self.end()
            raise
        if status == "ok":
            return answer
        if status == "error":
            self.end()  # after an illegal access nothing else runs in that process
        raise EntryFailed(status, answer)

    def start(self) -> None:
        """Start the process if there is none; it imports PyTorch while others do."""
        if self._process is not None:
            return
        spawn = multiprocessing.get_context("spawn")
        self._pipe, other_end = spawn.Pipe()
        self._process = spawn.Process(
            target=_serve, args=(other_end, os.getpid(), self.entry, self._device, self._threads, self._slowest)
        )
        self._process.start()
        other_end.close()

    def end(self) -> None:
        """End the process, even if it is stuck."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process = self._pipe = None


class Batch(NamedTuple):
    """Seconds of a call in each of the samples of a batch, joules of the batch, pauses included, and MHz at its end. A sample
    is of `calls` calls. A batch of a loop has samples of the `hosts` time of a layer."""

    seconds: list[float]
    joules: float | None
    clock: float | None
    calls: int = 1
    hosts: tuple[tuple[float, ...], ...] = ()

    @property
    def spent(self) -> float:
        """Return the seconds that were timed."""
        return sum(self.seconds) * self.calls


class LoadedCall:
    """The call that is ready to be timed in the worker process; at most one."""

    def __init__(self, entry: Entry, device: str, slowest: float) -> None:
        self._entry, self._device, self._clock, self._slowest = entry, device, Clock(device), slowest
        self._power = Power(device)
        self._call: Call | None = None
        self._longest = slowest  # seconds of a call at this point

    def load(self, point: Point) -> dict[str, Any]:
        """Build the call and warm it up; return the seconds of the first calls, and the memory of one."""
        self.drop()
        self._longest = max(self._slowest, point.tokens / MIN_TOKENS_PER_SECOND)
        module, _, function = self._entry.maker.partition(":")
        self._call = getattr(importlib.import_module(module), function)(point, self._entry, self._device)
        assert self._call is not None
        warm = self._clock.warm(self._call, 1)
        if warm[0] < 1:
            warm += self._clock.warm(self._call, WARM - 1)
        allocated, reserved = self._clock.peak(self._call)
        return {"warm": warm, "allocated": allocated, "reserved": reserved}

    def time(self, seconds: float, most: int) -> Batch:
        """Take samples until `seconds` are spent or there are `most`, one at least."""
        assert self._call is not None
        taken: list[float] = []
        calls = max(1, self._call.window)
        host = self._call.host
        hosts = tuple(host() for _ in range(HOST_SAMPLES)) if host else ()
        before = self._power.joules()
        while not taken or (sum(taken) * calls < seconds and len(taken) < most):
            taken.append(self._clock.time(self._call))
            if taken[-1] > self._longest:
                raise TimeoutError(f"a call takes {taken[-1]:.1f} s, and {self._longest:.0f} s are allowed")
        clock, after = self._power.megahertz(), self._power.joules()
        return Batch(taken, None if before is None or after is None else after - before, clock, calls, hosts)

    def drop(self) -> None:
        """Forget the call and free its memory."""
        self._call = None
        gc.collect()
        if self._device.startswith("cuda"):
            torch.cuda.synchronize()
            torch._C._cuda_clearCublasWorkspaces()  # of streams that are gone: 32 MiB each, which the next point would count
            torch.cuda.empty_cache()


def _prepare(entry: Entry, device: str) -> None:
    """Import the modules that its calls need, which takes seconds."""
    importlib.import_module(entry.maker.partition(":")[0])
    backends.unavailable(entry.implementation.removeprefix("fused:"), device)


def _serve(pipe: Connection, parent: int, entry: Entry, device: str, threads: int, slowest: float) -> None:
    follow(parent)
    torch.set_num_threads(threads)
    with contextlib.suppress(Exception):  # some have no backend; a failed import is reported when the call is built
        _prepare(entry, device)
    loaded = LoadedCall(entry, device, slowest)
    handlers: dict[str, Callable[..., Any]] = {"load": loaded.load, "time": loaded.time, "drop": loaded.drop}
    while True:
        try:
            request, *arguments = pipe.recv()
        except EOFError:
            return
        try:
            answer = "ok", handlers[request](*arguments)
        except (torch.OutOfMemoryError, MemoryError) as error:
            answer = "oom", str(error).splitlines()[0] if str(error) else "out of memory"
        except TimeoutError as error:
            answer = "timeout", str(error)
        except Exception as error:  # a kernel may raise anything; the run goes on and the record says what
            out = "out of memory" in str(error).lower() or "can't allocate memory" in str(error)
            answer = "oom" if out else "error", f"{type(error).__name__}: {str(error)[:400]}"
        if answer[0] in ("oom", "timeout"):
            with contextlib.suppress(Exception):
                loaded.drop()
        pipe.send(answer)
