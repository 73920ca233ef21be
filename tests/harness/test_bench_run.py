"""Benchmark runs: licence before speed, frontiers, resume, verdicts between runs."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from harness.bench.run import fits_together, refusal, time_points
from harness.cli.app import app
from harness.records.finding import Finding
from harness.records.record import Record
from harness.records.speed import Entry, Point, Speed
from harness.runs.store import Run

BOX = {"gpu": None, "cpu": "a box", "fingerprints": {}, "packages": {}}


def point(length: int, mode: str = "infer") -> Point:
    return Point("fake", (("B", 1), ("L", length)), mode, dtype="float32")


def entry(kind: str, role: str = "ours") -> Entry:
    return Entry(kind, "fake", role, f"fakes:{kind}")


def passed(e: Entry, check: str = "forward", error: float = 0.5) -> Record:
    finding = Finding("y", "l2", error, 1.0)
    return Record(e.subject, e.implementation, e.role, check, "case", "float32", "pass" if error <= 1 else "fail", 0.1, "",
                  (finding,))  # fmt: skip


def new_run(folder: Path, *records: Record) -> Run:
    run = Run.create(folder, {"kind": "bench", "plan": {"budget": 0.01}, "box": BOX})
    for record in records:
        run.add(record)
    return run


def timed(run: Run, lengths: list[int], who: list[Entry]) -> dict[tuple[str, int], Speed]:
    time_points(run, [point(n) for n in lengths], lambda p: who, None, 0.01, 10.0, "cpu", 1, lambda speed: None)
    return {(s.entry.subject, s.point["L"]): s for s in run.speeds}


@pytest.mark.usefixtures("forked_workers")
def test_out_of_memory_ends_a_curve_and_longer_points_are_implied(tmp_path: Path) -> None:
    greedy = entry("greedy")
    speeds = timed(new_run(tmp_path, passed(greedy)), [2, 1001, 2000], [greedy])
    assert [speeds["greedy", n].status for n in (2, 1001, 2000)] == ["ok", "oom", "implied"]
    assert "L1001" in speeds["greedy", 2000].reason


@pytest.mark.usefixtures("forked_workers")
def test_resume_times_only_what_is_left(tmp_path: Path) -> None:
    sleeper = entry("sleeper")
    timed(new_run(tmp_path, passed(sleeper)), [1, 2], [sleeper])
    path = tmp_path / "speeds.jsonl"
    whole = path.read_text()
    path.write_text(whole[: len(whole) - 40])  # killed while writing the second
    again = Run.open(tmp_path)
    assert [s.point["L"] for s in again.speeds] == [1]
    first = again.speeds[0]
    timed(again, [1, 2, 3], [sleeper])
    kept = Run.open(tmp_path).speeds
    assert [s.point["L"] for s in kept] == [1, 2, 3] and kept[0] == first


@pytest.mark.usefixtures("forked_workers")
def test_what_fails_parity_gets_no_speed_unless_it_is_a_rival(tmp_path: Path) -> None:
    ours, rival, unasked = entry("sleeper"), Entry("sleeper", "theirs", "rival", "fakes:sleeper"), entry("greedy")
    run = new_run(tmp_path, passed(ours, error=3.0), passed(rival, error=float("inf")))
    timed(run, [2], [ours, rival, unasked])
    speeds = {s.entry: s for s in run.speeds}
    assert speeds[ours].status == "gated" and "3 budgets" in speeds[ours].reason
    assert speeds[rival].status == "ok" and speeds[rival].wrong == float("inf")
    assert Run.open(tmp_path).speeds == run.speeds
    assert speeds[unasked].status == "gated" and "asked it nothing" in speeds[unasked].reason


def test_all_load_at_once_where_what_they_took_before_has_room_for_its_growth(tmp_path: Path) -> None:
    run = Run.create(tmp_path, {"kind": "bench", "plan": {}, "box": BOX | {"gpu_memory_gib": 100.0}})
    both = [entry("sleeper"), entry("greedy")]
    for e, gib in zip(both, (10, 14), strict=True):
        assert not fits_together(run, both, point(400_000))  # nothing is known of one of them
        run.add_speed(Speed(e, point(200_000), "ok", (1.0,), reserved=gib * 2**30))
    assert fits_together(run, both, point(700_000)) and not fits_together(run, both, point(800_000))
    assert fits_together(run, both, point(1000, "train")) and not fits_together(run, both, point(400_000, "train"))


def test_a_wrong_gradient_gates_training_only() -> None:
    ours = entry("sleeper")
    records = [passed(ours), passed(ours, "backward", error=2.0)]
    assert refusal(ours, point(2), records) == ("", 0.0)
    assert refusal(ours, point(2, "train"), records)[1] == 2.0


@pytest.mark.parametrize(("factor", "code", "said"), [(1.05, 1, "SLOWER"), (1.0, 0, "SAME"), (0.9, 0, "FASTER")])
def test_compare(factor: float, code: int, said: str, tmp_path: Path) -> None:
    samples = [1e-3 * (1 + 1e-4 * i) for i in range(20)]
    for name, by in (("base", 1.0), ("new", factor)):
        run = new_run(tmp_path / name)
        run.add_speed(Speed(entry("sleeper"), point(2), "ok", tuple(by * s for s in samples)))
        run.add_speed(Speed(entry("greedy"), point(2), "gated", reason="wrong"))
    done = CliRunner().invoke(app, ["compare", str(tmp_path / "base"), str(tmp_path / "new")])
    assert done.exit_code == code and f"1 {said}" in done.output
    assert "greedy fake fake-B1-L2-infer-eager-float32: gated, it has no speed" in done.output


def test_two_boxes_do_not_compare(tmp_path: Path) -> None:
    for name, gpu in (("base", "one"), ("new", "other")):
        run = new_run(tmp_path / name)
        run.about["box"] = BOX | {"gpu": gpu}
        run.save()
    done = CliRunner().invoke(app, ["compare", str(tmp_path / "base"), str(tmp_path / "new")])
    assert done.exit_code != 0 and "gpu differs" in str(done.exception)


@pytest.mark.parametrize("wrong", [("ok", (), ""), ("gated", (1.0,), "x"), ("oom", (), ""), ("fast", (1.0,), "")])
def test_mixtures_that_mean_nothing_cannot_be_built(wrong: tuple) -> None:
    status, seconds, reason = wrong
    with pytest.raises(ValueError):
        Speed(entry("sleeper"), point(2), status, seconds, reason=reason)


def test_bench_of_one_operator_end_to_end(tmp_path: Path) -> None:
    options = ["bench", "--race", "norm", "--budget", "0.02", "--device", "cpu", "--out", str(tmp_path / "run")]
    done = CliRunner().invoke(app, options)
    assert done.exit_code == 0, (done.output, done.exception)
    run = Run.open(tmp_path / "run")
    assert len(run.speeds) == 8 and all(s.status == "ok" and 0 < s.bound for s in run.speeds)
    assert any(r.status == "pass" and r.check == "backward" for r in run.records)
    before = (tmp_path / "run" / "speeds.jsonl").read_text()
    assert CliRunner().invoke(app, [*options, "--resume"]).exit_code == 0
    assert (tmp_path / "run" / "speeds.jsonl").read_text() == before
