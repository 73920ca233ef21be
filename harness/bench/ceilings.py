"""Measurement of the rates that a box reaches at best, in the run that is compared with them."""

import statistics
from collections.abc import Callable

import torch

from harness.bench.clock import Call, Clock
from harness.records.ceilings import Ceilings

SAMPLES = 11


def measure(device: str, dtype: str) -> Ceilings:
    """Return medians of a large copy, a large matmul in `dtype`, and exponentials of numbers in registers or cache."""
    gpu = device.startswith("cuda")
    clock = Clock(device)

    def rate(work: float, run: Callable[[], object]) -> float:
        call = Call(run, queued=True)
        clock.warm(call, 3)
        return work / statistics.median(clock.time(call) for _ in range(SAMPLES))

    with torch.device(device), torch.no_grad():
        source = torch.ones(2**30 if gpu else 2**26, dtype=torch.uint8)
        target = torch.empty_like(source)
        side = 8192 if gpu else 1024
        a, b = (torch.randn(side, side, dtype=getattr(torch, dtype)) for _ in range(2))
        out = torch.empty_like(a)
        copy = rate(2 * source.numel(), lambda: target.copy_(source))
        matmul = rate(2 * side**3, lambda: torch.mm(a, b, out=out))
        exp = rate(*(_exponentials() if gpu else _exponentials_on_cpu()))
    return Ceilings(copy, matmul, exp)


def _exponentials_on_cpu() -> tuple[float, Callable[[], object]]:
    x = torch.zeros(2**16)
    out = torch.empty_like(x)
    return 64 * x.numel(), lambda: [torch.exp(x, out=out) for _ in range(64)]


def _exponentials() -> tuple[float, Callable[[], object]]:
    from harness.bench import ex2

    out = torch.empty(ex2.NUMBERS, device="cuda")
    blocks = torch.cuda.get_device_properties(0).multi_processor_count * 16
    return float(blocks * ex2.NUMBERS * ex2.REPEATS), lambda: ex2.launch(blocks, out)
