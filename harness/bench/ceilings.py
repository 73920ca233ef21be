"""Measurement of the rates that a box reaches at best, in the run that is compared with them.

On a CPU the rates are those of as many threads as the timed calls have. Memory is measured at several sizes, since a rate of
DRAM bounds nothing that stays in a cache. What has no part outside of a core (matrix products, exponentials, small copies) is
also measured on one thread and multiplied: where other work takes turns on the cores, threads that wait for each other are far
slower than their sum.
"""

from collections.abc import Callable, Sequence

import torch

from harness.bench.clock import Call, Clock
from harness.records.ceilings import ISSUED_PER_EXP, BoxCeilings

MIN_SAMPLES, MAX_SAMPLES = 11, 200
CPU_SECONDS = 0.15  # of samples of a rate
CPU_SIZES = tuple(2**power for power in (18, 20, 22, 24, 26, 28))  # bytes read and written by one pass
MAX_PER_CORE = 2**24  # bytes above which cores share what moves them
PASSES = 2**24  # bytes that a sample of a small size moves, in several passes
MAX_UNCERTAINTY = 0.05  # above it, a share of more than 100 % is no doubt of the clock


def measure(device: str, dtypes: Sequence[str], threads: int) -> BoxCeilings:
    """Return the best rates of large and small copies, of matmuls in each dtype, and of exponentials in registers or cache."""
    return _on_gpu(device, dtypes) if device.startswith("cuda") else _on_cpu(dtypes, threads)


class _Rates:
    """The best of several samples, and how much the third best is below them."""

    def __init__(self, device: str, seconds: float) -> None:
        self._clock, self._seconds, self.uncertainty = Clock(device), seconds, 0.0

    def best(self, work: float, run: Callable[[], object]) -> float:
        """Return the best rate of a call that does so much work."""
        call = Call(run, queued=True)
        self._clock.warm(call, 3)
        taken: list[float] = []
        while len(taken) < MIN_SAMPLES or (sum(taken) < self._seconds and len(taken) < MAX_SAMPLES):
            taken.append(self._clock.time(call))
        first, _, third, *_ = sorted(taken)
        self.uncertainty = min(MAX_UNCERTAINTY, max(self.uncertainty, third / first - 1))
        return work / first


def _on_gpu(device: str, dtypes: Sequence[str]) -> BoxCeilings:
    """Return the ceilings of a GPU; timed inputs are not in its cache."""
    rates, side = _Rates(device, 0.0), 8192
    with torch.device(device), torch.no_grad():
        source = torch.ones(2**30, dtype=torch.uint8)
        target = torch.empty_like(source)
        copy = rates.best(2 * source.numel(), lambda: target.copy_(source))
        matmuls = {dtype: rates.best(2 * side**3, _matmul(side, dtype)) for dtype in dtypes}
        exp = rates.best(*_exponentials())
    return BoxCeilings(((0, copy),), matmuls, exp, ISSUED_PER_EXP * exp, rates.uncertainty)


def _on_cpu(dtypes: Sequence[str], threads: int) -> BoxCeilings:
    """Return the ceilings of so many threads of a CPU. How many instructions it can issue is not known."""
    rates = _Rates("cpu", CPU_SECONDS)

    def per_core(work: float, run: Callable[[], object]) -> float:
        torch.set_num_threads(1)
        one = rates.best(work, run) * threads
        torch.set_num_threads(threads)
        return max(one, rates.best(work, run)) if threads > 1 else one

    with torch.no_grad():
        torch.set_num_threads(threads)
        copies = []
        for size in CPU_SIZES:
            rate = max(rates.best(moved, run) for moved, run in _passes(size))
            if size <= MAX_PER_CORE and threads > 1:
                torch.set_num_threads(1)
                rate = max(rate, *(threads * rates.best(moved, run) for moved, run in _passes(size // threads)))
                torch.set_num_threads(threads)
            copies.append((size, rate))
        matmuls = {dtype: per_core(2 * 1024**3, _matmul(1024, dtype)) for dtype in dtypes}
        exp = per_core(*_exponentials_on_cpu())
    return BoxCeilings(tuple(copies), matmuls, exp, None, rates.uncertainty)


def _passes(size: int) -> list[tuple[float, Callable[[], object]]]:
    """Return the bytes moved and the calls of passes over `size` bytes: a copy, and a sum, which only reads."""
    repeats = max(1, PASSES // size)
    numbers = torch.ones(size // 4)
    source, target = numbers.chunk(2)
    moved = float(repeats * size)
    return [
        (moved, lambda: [target.copy_(source) for _ in range(repeats)]),
        (moved, lambda: [numbers.sum() for _ in range(repeats)]),
    ]


def _matmul(side: int, dtype: str) -> Callable[[], object]:
    a, b = (torch.randn(side, side, dtype=getattr(torch, dtype)) for _ in range(2))
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out)


def _exponentials_on_cpu() -> tuple[float, Callable[[], object]]:
    x = torch.zeros(2**16)
    out = torch.empty_like(x)
    return 16 * x.numel(), lambda: [torch.exp(x, out=out) for _ in range(16)]


def _exponentials() -> tuple[float, Callable[[], object]]:
    from harness.bench import ex2

    out = torch.empty(ex2.NUMBERS, device="cuda")
    blocks = torch.cuda.get_device_properties(0).multi_processor_count * 16
    return float(blocks * ex2.NUMBERS * ex2.REPEATS), lambda: ex2.launch(blocks, out)
