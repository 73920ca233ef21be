"""The speeds of a run in pytest-benchmark's format, so that `pytest-benchmark compare` reads them."""

import json
from pathlib import Path

from pytest_benchmark import __version__
from pytest_benchmark.stats import Stats

from harness.records.speed import Speed
from harness.runs.store import Run


def write(run: Run) -> Path:
    """Write benchmark.json into the run's folder, times in seconds, raw samples included; return its path."""
    box = run.about["box"]
    given = {
        "machine_info": {"node": box.get("gpu") or box.get("cpu"), "cpu": {"brand_raw": box.get("cpu")}} | box,
        "commit_info": {"id": box.get("git", {}).get("commit"), "dirty": box.get("git", {}).get("dirty")},
        "benchmarks": [_benchmark(s) for s in run.speeds if s.seconds],
        "datetime": run.about.get("ended", run.about["started"]),
        "version": __version__,
    }
    path = run.folder / "benchmark.json"
    path.write_text(json.dumps(given, indent=1) + "\n")
    return path


def _benchmark(speed: Speed) -> dict:
    stats = Stats()
    for second in speed.seconds:
        stats.update(second)
    entry, point = speed.entry, speed.point
    return {
        "group": point.name,
        "name": entry.name,
        "fullname": f"{point.name}::{entry.name}",
        "params": dict(point.dims) | {"mode": point.mode, "way": point.way, "dtype": point.dtype},
        "param": None,
        "extra_info": {"allocated": speed.allocated, "reserved": speed.reserved, "wrong_by_budgets": speed.wrong},
        "options": {"disable_gc": False, "timer": "harness.bench.clock", "warmup": True},
        "stats": stats.as_dict() | {"data": list(speed.seconds), "iterations": 1},
    }
