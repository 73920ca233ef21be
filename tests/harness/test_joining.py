"""Runs of several calls over one commit, accepted together as one."""

from pathlib import Path

import pytest
from test_accept import BOX, a_record, a_speed, finished
from typer.testing import CliRunner

from fused import stamp
from harness.cli.app import app
from harness.records.finding import Finding
from harness.records.record import Record
from harness.report.accepted import MARKERS
from harness.runs import acceptance, environment, freshness
from harness.runs.joining import join
from harness.runs.store import Run, StoreError


def answer(subject: str, error: float = 1.0) -> Record:
    return Record(subject, "fused:torch", "ours", "forward", "c", "float32", "pass", findings=(Finding("y", "l2", error, 2.0),))


def part(folder: Path, *records: Record, started: str = "2030-01-01T00:00:00+00:00", box: dict = BOX, **plan: object) -> Run:
    run = finished(folder, [box], **plan)
    run.about["started"] = started
    run.save()
    for record in records:
        run.add(record)
    return run


def test_parts_become_one(tmp_path: Path) -> None:
    later = part(tmp_path / "b", answer("conv"), answer("scan", 0.5), started="2030-01-02T00:00:00+00:00", subjects=["conv"])
    first = part(tmp_path / "a", answer("scan"), subjects=["scan"], threads=2)
    whole = join([later, first], tmp_path / "whole")
    again = Run.open(tmp_path / "whole")
    assert again.about == whole.about and again.records == whole.records
    assert again.about["plan"]["subjects"] == ["scan", "conv"] and len(again.about["sessions"]) == 2
    assert again.about["started"] == first.about["started"] and again.about["status"] == "finished"
    assert {r.subject: r.findings[0].error for r in again.records} == {"scan": 0.5, "conv": 1.0}  # the newest counts
    everything = part(tmp_path / "c", answer("norm"))
    assert join([first, everything], tmp_path / "all").about["plan"]["subjects"] == []
    assert Run.open(tmp_path / "a").about["plan"]["subjects"] == ["scan"]  # the parts stay as they are


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"box": BOX | {"driver": "580.2"}}, "no parts of one run, they differ in driver 570.1, then 580.2; accept each"),
        ({"box": BOX | {"fingerprints": {"fused": "9"}}}, "differ in fingerprints of"),
        ({"grid": "full"}, "the runs differ in grid smoke, full; allowed: one option that narrows"),
        ({"subjects": ["conv"], "checks": ["forward"]}, r"the runs differ in subjects \['scan'\], \['conv'\]; checks all, "),
    ],
)
def test_what_is_no_part(other: dict, said: str, tmp_path: Path) -> None:
    """Two narrowed options together would claim questions that no run asked."""
    runs = part(tmp_path / "a", subjects=["scan"]), part(tmp_path / "b", **({"subjects": ["scan"]} | other))
    with pytest.raises(StoreError, match=said):
        join(runs, tmp_path / "whole")
    assert not (tmp_path / "whole").exists()


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout whose code is that of BOX, in a clean commit."""
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    monkeypatch.setattr(environment, "git", lambda: {"commit": "c" * 40, "dirty": False})
    monkeypatch.setattr(environment, "describe", lambda device: BOX)
    monkeypatch.setattr(acceptance, "ACCEPTED", tmp_path / "reports/accepted")
    monkeypatch.setattr(freshness, "ROOT", tmp_path)
    monkeypatch.setattr(stamp, "fingerprint", BOX["fingerprints"].get)
    (tmp_path / "reports").mkdir()
    (tmp_path / "reports/README.md").write_text("\n".join(MARKERS))
    return tmp_path


def accept(*runs: Run) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["accept", *(str(run.folder) for run in runs)])
    return done.exit_code, done.output if done.exit_code == 0 else f"{done.output}{done.exception}"


def test_the_command_accepts_runs_of_one_kind_as_one(here: Path, tmp_path: Path) -> None:
    one = part(tmp_path / "one", answer("scan"), subjects=["scan"])
    two = part(tmp_path / "two", answer("conv"), subjects=["conv"], started="2030-01-03T00:00:00+00:00")
    code, said = accept(one, two)
    kept = here / "reports/accepted/h200/one"
    assert code == 0 and said.splitlines() == [str(kept), "covers parity of grid smoke; subjects scan, conv"], said
    run = Run.open(kept)
    assert len(run.records) == 2 and run.about["commit"] == "c" * 40
    assert "All 2 answers of our implementations" in (kept / "report.md").read_text()
    assert "accepted/h200/one/report.html" in (here / "reports/index.html").read_text()
    assert [path.name for path in (here / "reports/accepted/h200").iterdir()] == ["one"]


def test_nothing_is_accepted_where_one_may_not_be(here: Path, tmp_path: Path) -> None:
    good, bad = part(tmp_path / "good", answer("scan")), part(tmp_path / "bad", a_record("ours"))
    assert "1 of ours failed" in accept(good, bad)[1] and not (here / "reports/accepted").exists()


def test_runs_of_several_kinds_are_accepted_each(here: Path, tmp_path: Path) -> None:
    parity, bench = part(tmp_path / "parity", answer("scan")), part(tmp_path / "bench")
    bench.about["kind"] = "bench"
    bench.about["ceilings"] = {}
    bench.save()
    bench.add_speed(a_speed("rival", "oom"))
    code, said = accept(parity, bench)
    assert code == 0, said
    assert sorted(path.name for path in (here / "reports/accepted/h200").iterdir()) == ["bench", "parity"]
