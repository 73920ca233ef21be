"""The clock for a call: on a GPU by CUDA events, of a loop by the wall clock, of a reader by CPU time; and its peak memory."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass
class Call:
    """A call to be timed. `run` is the timed call; `before`, which is not timed, precedes it."""

    run: Callable[[], object]
    before: Callable[[], object] | None = None
    cpu_time: bool = False  # a call that uses no device: count the seconds of all cores that its process keeps busy
    queued: bool = False  # time the device alone: the launches are queued after a pause
    peak: tuple[int, int] | None = None  # bytes allocated and reserved, where a call hides them
    launch: float = 0.0  # seconds that the host needs at most to launch it; measured by `warm`
    window: int = 0  # of a loop: calls between two synchronisations, which share the wall-clock time between these
    host: Callable[[], tuple[float, ...]] | None = None  # takes a sample of `Speed.host`, which needs an idle device


class Clock:
    """The clock of one device."""

    def __init__(self, device: str) -> None:
        self.device, self.gpu = device, device.startswith("cuda")

    def time(self, call: Call) -> float:
        """Return the seconds of one call; of a loop, of one among those of a window."""
        if call.window:
            return self._window(call)
        if call.before:
            call.before()
        if self.gpu and not call.cpu_time:
            return self._on_gpu(call)
        return self._by(time.process_time if call.cpu_time else time.perf_counter, call)

    def warm(self, call: Call, count: int) -> list[float]:
        """Return the seconds of the first calls, which compile, allocate and fill caches."""
        taken = [self.time(call) for _ in range(count)]
        if self.gpu and call.queued:
            begin = time.perf_counter()
            call.run()
            call.launch = 2 * (time.perf_counter() - begin)
            torch.cuda.synchronize(self.device)
        return taken

    def _by(self, clock: Callable[[], float], call: Call) -> float:
        begin = clock()
        call.run()
        return clock() - begin

    def _window(self, call: Call) -> float:
        self._synchronize()
        begin = time.perf_counter()
        for _ in range(call.window):
            call.run()
        self._synchronize()
        return (time.perf_counter() - begin) / call.window

    def _synchronize(self) -> None:
        if self.gpu:
            torch.cuda.synchronize(self.device)

    def _on_gpu(self, call: Call) -> float:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(self.device)
        if call.queued:
            torch.cuda._sleep(int(call.launch * 2e9))  # in cycles; a GPU has no more than 2e9 in a second
        start.record()
        call.run()
        stop.record()
        torch.cuda.synchronize(self.device)
        return start.elapsed_time(stop) * 1e-3

    def peak(self, call: Call) -> tuple[int, int]:
        """Return bytes allocated and reserved at the peak of one call; without a GPU the resident memory of the process,
        twice."""
        if call.peak:
            return call.peak
        if call.before:
            call.before()
        if call.cpu_time or not self.gpu:
            Path("/proc/self/clear_refs").write_text("5")  # Linux: forget the peak so far
            call.run()
            resident = _status("VmHWM")
            return resident, resident
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        call.run()
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device), torch.cuda.max_memory_reserved(self.device)


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))
