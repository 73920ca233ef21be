"""Shares of the roofline: of ceilings that hold where the data lie, never above 100 %, and none where the ceiling is wrong."""

import dataclasses
import json
import math
import re
from pathlib import Path

import pytest
import sweeps
import test_bench_run

from harness.bench import ceilings, grids, roofline
from harness.bench.run import time_points
from harness.records.ceilings import BoxCeilings
from harness.records.speed import Entry, Point, Speed
from harness.report import bench, measurement, overview, speed_tables
from harness.runs.store import Run

COPIES = (2**20, 3e11), (2**22, 1e11), (2**24, 2e11), (2**28, 1e10)
BOX = BoxCeilings(COPIES, {"float32": 1e11, "bfloat16": 4e11}, exp=1e9, uncertainty=0.02)
RATES = [(0, 3e11), (2**21, 3e11), (2**22, 2e11), (2**25, 2e11), (2**28, 1e10), (2**40, 1e10)]
CAUSES = [("norm", "infer", "copy"), ("conv", "train", "copy"), ("scan", "infer", "exp"), ("scan", "train", "exp")]


def point(tokens: int, mode: str = "infer", race: str = "norm") -> Point:
    sizes = {"norm": (("D", 192),), "conv": (("E", 384), ("K", 4)), "scan": (("E", 384), ("N", 16)), "mixer": (("D", 192),)}
    return Point(race, (("B", 1), ("L", tokens), *sizes[race]), mode, dtype="float32")


def at(seconds: float, where: Point, variant: str = "") -> Speed:
    return Speed(Entry(where.race, "fused:torch", "ours", variant=variant), where, "ok", (seconds,) * 7)


@pytest.mark.parametrize(("resident", "rate"), RATES)
def test_memory_has_the_rate_of_what_fits_there(resident: int, rate: float) -> None:
    """The next smaller size, and never less than of a larger one, which a busy box may measure as faster."""
    assert BOX.at("float32", resident).copy == rate


def test_matrix_products_have_the_rate_of_their_dtype() -> None:
    assert (BOX.at("float32", 0).matmul, BOX.at("bfloat16", 0).matmul, BOX.at("float16", 0).matmul) == (1e11, 4e11, math.inf)
    assert BoxCeilings.from_json(json.loads(json.dumps(BOX.to_json()))) == BOX


@pytest.mark.parametrize(("race", "mode", "by"), [*CAUSES, ("mixer", "infer", "exp")])
def test_the_bound_says_where_it_comes_from(race: str, mode: str, by: str) -> None:
    where = point(100, mode, race)
    speed = roofline.bounded(at(1.0, where), BOX)
    assert speed.bound_by == by and speed.bound_error == BOX.uncertainty
    ceilings_there = BOX.at("float32", 0)  # so few tokens fit into the fastest cache
    assert speed.bound == pytest.approx(roofline.bound(where, race, "", ceilings_there))
    slow = dataclasses.replace(BOX, matmuls={"float32": 1.0})
    assert roofline.bounded(at(1.0, point(500, mode, "mixer")), slow).bound_by == "matmul"
    assert roofline.bounded(at(1.0, point(500, mode, "scan")), dataclasses.replace(BOX, issue=1.0)).bound_by == "issue"


def test_what_fits_into_a_cache_is_held_against_the_cache() -> None:
    small, large = (roofline.bounded(at(1.0, point(tokens)), BOX) for tokens in (1000, 1_000_000))
    assert large.bound / small.bound == pytest.approx(1000 * 3e11 / 1e10)
    training = roofline.bounded(at(1.0, point(1_000, "train")), BOX)  # 2.2 MiB a pass, 6.6 in all
    assert training.bound * 3e11 == pytest.approx(1_000 * 192 * (2 * 4 + 8 + 2 * 4 + 12))


@pytest.mark.parametrize(
    ("times", "share"), [(0.5, 0.5), (1.0, 1.0), (1.019, 1.0), (1.021, None), (2.87, None)]
)
def test_no_share_is_above_100(times: float, share: float | None) -> None:
    """Within the uncertainty of the ceilings it is 100 %; above it there is no bound."""
    bound = roofline.bounded(at(1.0, point(1000)), BOX).bound
    speed = roofline.bounded(at(bound / times, point(1000)), BOX)
    assert speed.share == (share if share is None else pytest.approx(share)) and bool(speed.no_bound) == (share is None)
    assert Speed.parse(speed.to_line()) == speed
    if share is None:
        assert speed.no_bound == f"{times:.3g} times as fast as the measured ceiling of memory traffic would allow"
        assert speed_tables.percent(speed) == f"no bound: {speed.no_bound}"
    else:
        assert speed_tables.percent(speed) == ("50 %" if share < 1 else "100 %")


def test_older_lines_are_read() -> None:
    raw = json.loads(at(1.0, point(9)).to_line())
    for name in ("bound_by", "bound_error"):
        del raw[name]
    assert Speed.parse(json.dumps(raw)) == at(1.0, point(9))
    assert at(1.0, point(9)).share is None and speed_tables.percent(at(1.0, point(9))) == "-"
    old = dataclasses.replace(at(1.0, point(9)), bound=1.5)
    assert old.no_bound == "1.5 times as fast as the measured ceilings would allow"


def test_a_ceiling_that_is_planted_too_low_gives_no_share_in_any_page(tmp_path: Path) -> None:
    """From the timing on: a sleep of 2 ms, held against a norm's traffic on a box that moves a byte a second."""
    entry = Entry("norm", "fused:torch", "ours", "fakes:sleeper")
    places = [Point("norm", (("B", 1), ("L", 2), ("D", 192)), mode, dtype="float32") for mode in ("infer", "train")]
    too_low = dataclasses.replace(BOX, copies=((0, 1.0),))
    records = [test_bench_run.passed(entry, check) for check in ("forward", "backward")]
    for name, box in (("low", too_low), ("right", BOX)):
        run = test_bench_run.new_run(tmp_path / name, *records)
        time_points(run, places, lambda p: [entry], box, 0.01, 10.0, "cpu", 1, lambda speed: None)
        run = Run.open(tmp_path / name)
        run.about |= {"ceilings": box.to_json(), "plan": {"device": "cpu", "budget": 0.01}}
        bench.write(run)
        text = (tmp_path / name / "report.md").read_text()
        [caption] = re.findall(r"!\[(.*)\]\(roofline-infer.svg\)", text)
        row = overview.overview(run.speeds).splitlines()[-1]
        assert not any(float(n) > 100 for n in re.findall(r"([\d.e+]+) %", text + row))
        assert (row.count("no bound") == 2) == (name == "low")
        assert ("times as fast as the measured ceiling of memory traffic would allow" in text) == (name == "low")
        assert ("no bound: " in caption) == (name == "low")


def test_a_cpu_is_measured_by_threads_and_sizes() -> None:
    box = ceilings.measure("cpu", ("float32", "bfloat16"), 1)
    assert [size for size, _ in box.copies] == list(ceilings.CPU_SIZES) and set(box.matmuls) == {"float32", "bfloat16"}
    assert min(rate for _, rate in box.copies) > 1e8 and box.matmuls["float32"] > 1e8 and box.exp > 1e6
    assert box.issue is None and 0 <= box.uncertainty <= ceilings.MAX_UNCERTAINTY
    assert box.at("float32", 0).copy >= box.at("float32", 2**30).copy


def test_ceilings_of_older_runs_are_shown(tmp_path: Path) -> None:
    run = sweeps.made(tmp_path / "run", [])
    assert "| copy, read plus written | 4,230 GB/s |" in measurement.ceilings(run)
    run.about["ceilings"] = BOX.to_json()
    said = measurement.ceilings(run)
    assert "| memory, 1 MiB moved again and again | 300 GB/s |" in said
    assert "| matrix product in bfloat16 | 0.4 TFLOP/s |" in said


def test_every_timed_subject_has_a_bound_on_every_cpu_point() -> None:
    for where in grids.points("cpu"):
        for subject, variant in grids.race_of(where).contenders:
            speed = roofline.bounded(Speed(Entry(subject, "x", "ours", variant=variant), where, "ok", (1.0,)), BOX)
            assert 0 < speed.bound < math.inf and speed.bound_by
