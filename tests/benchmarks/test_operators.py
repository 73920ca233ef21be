"""One operator under pytest-benchmark: `pytest --benchmark-only tests/benchmarks -k scan`. On a GPU its clock are CUDA events.

A front door for a quick look while writing a kernel. It asks for no licence and takes no turns: claims come from
`nox -s bench`.
"""

import pytest
import torch

from harness.bench.grids import OPERATORS, entries
from harness.bench.workloads import make
from harness.records.speed import Point

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = "bfloat16" if DEVICE == "cuda" else "float32"
SIZES = {"B": 8, "L": 1569, "E": 1152} if DEVICE == "cuda" else {"B": 1, "L": 197, "E": 384}
_origin: list[torch.cuda.Event] = []


def events() -> float:
    """Seconds on the GPU's clock: everything launched before has ended."""
    now = torch.cuda.Event(enable_timing=True)
    now.record()
    now.synchronize()
    if not _origin:
        _origin.append(now)
    return _origin[0].elapsed_time(now) * 1e-3


def sizes(race: str) -> tuple[tuple[str, int], ...]:
    if race in ("norm", "mixer"):
        return ("B", SIZES["B"]), ("L", SIZES["L"]), ("D", SIZES["E"] // 2)
    return (*SIZES.items(), ("K", 4) if race == "conv" else ("N", 16))


RACERS = [(race, entry) for race in OPERATORS for entry in entries(race, DEVICE, "sdpa")]


@pytest.mark.parametrize("mode", ["infer", "train"])
@pytest.mark.parametrize(("race", "entry"), RACERS, ids=[f"{race}-{entry.implementation}" for race, entry in RACERS])
def test_operator(benchmark, race, entry, mode) -> None:
    call = make(Point(race, sizes(race), mode, dtype=DTYPE), entry, DEVICE)
    benchmark.group = f"{race} {mode}"
    benchmark._timer = events if DEVICE == "cuda" else benchmark._timer
    benchmark.pedantic(call.run, rounds=30 if DEVICE == "cuda" else 5, warmup_rounds=3)
    assert benchmark.stats.stats.min > 0
