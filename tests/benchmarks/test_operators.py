"""One operator under pytest-benchmark: `pytest --benchmark-only tests/benchmarks -k scan`. On a GPU its clock are CUDA events.

A quick look while writing a kernel. It asks for no licence and interleaves nothing: claims come from `nox -s bench`.
"""

import pytest
import torch

from harness.bench.grids import entries, races
from harness.bench.workloads import make
from harness.judge.race import OPERATORS
from harness.records.speed import Entry, Point

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
_origin: list[torch.cuda.Event] = []


def events() -> float:
    """Return seconds on the GPU's clock: everything launched before has ended."""
    now = torch.cuda.Event(enable_timing=True)
    now.record()
    now.synchronize()
    if not _origin:
        _origin.append(now)
    return _origin[0].elapsed_time(now) * 1e-3


def point(race: str, mode: str) -> Point:
    """Return the widest of the race's points with many clips, on a CPU the shortest point."""
    found = [p for p in races()[race].points("full" if DEVICE == "cuda" else "cpu") if p.mode == mode]
    return next((p for p in reversed(found) if p["B"] == 8 and p["L"] == 1569), found[0])


RACERS = [(race, entry) for race in races(OPERATORS) for entry in entries(race, DEVICE, "sdpa")]


@pytest.mark.parametrize("mode", ["infer", "train"])
@pytest.mark.parametrize(("race", "entry"), RACERS, ids=[f"{race}-{entry.implementation}" for race, entry in RACERS])
def test_operator(benchmark, race: str, entry: Entry, mode: str) -> None:
    call = make(point(race, mode), entry, DEVICE)
    benchmark.group = f"{race} {mode}"
    benchmark._timer = events if DEVICE == "cuda" else benchmark._timer
    benchmark.pedantic(call.run, rounds=30 if DEVICE == "cuda" else 5, warmup_rounds=3)
    assert benchmark.stats.stats.min > 0
