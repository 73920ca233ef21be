"""Which parity runs leave a stamp: none but a full one that passed, of the sources and the box that are here now."""

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import fused
from fused import stamp
from harness.judge import stamps
from harness.judge.parity import absent_implementations, describe
from harness.judge.request import ParityRequest
from harness.records.finding import Finding
from harness.records.record import Record
from harness.runs import environment
from harness.runs.conclude import conclude
from harness.runs.progress import Progress
from harness.runs.store import Run

HERE = environment.describe("cpu") | {"git": {"commit": "c" * 40, "dirty": False}}
GOOD, BAD = Finding("y", "l2", 1.0, 2.0), Finding("y", "l2", 3.0, 2.0)
Change = Callable[[Run], None]


@functools.cache
def records(request: ParityRequest) -> tuple[Record, ...]:
    """A pass for every question that a CPU can be asked, as a run of all would leave it."""
    absent = list(absent_implementations(request))
    asked = (
        Record(case.subject, i.name, i.role, check, case.name, case.dtype, "pass", findings=(GOOD,))
        for case in request.selected_cases()
        for check, _, i in request.questions(case)
        if (case.subject, i.name) not in {r.key[:2] for r in absent}
    )
    return (*absent, *asked)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(environment, "describe", lambda device: HERE)


def made(folder: Path, request: ParityRequest, box: dict = HERE, status: str = "finished") -> Run:
    """A run of the request in which everything passed."""
    run = Run.create(folder, describe(request, box))
    run.records = list(records(request))
    run.finish(status)
    return run


FULL = ParityRequest("full", "cpu")


def test_a_full_run_that_passed_validates(tmp_path: Path) -> None:
    run = made(tmp_path / "run", FULL)
    assert stamps.refusal(run) is None and stamps.unanswered(run) == 0
    assert {("torch", "float32"), ("torch", "bfloat16")} <= set(stamps.write_stamps(run))
    found = fused.validation("torch", torch.float32, "cpu")
    assert found and found.run == "run" and {"forward", "backward", "chunks"} <= set(found.checks)
    assert (found.fused, found.harness) == (stamp.fingerprint("fused"), stamp.fingerprint("harness"))


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        (ParityRequest("smoke", "cpu"), "filtered"),
        (ParityRequest("full", "cpu", subjects=("scan",)), "filtered"),
        (ParityRequest("full", "cpu", checks=("forward",)), "filtered"),
        (ParityRequest("full", "cpu", names=("fused:torch",)), "filtered"),
        (ParityRequest("full", "cpu", dtypes=("float32",)), "filtered"),
        (ParityRequest("full", "cpu", cases=("*float32",)), "filtered"),
        (ParityRequest("full", "cpu", mutant="drop_skip"), "the bug drop_skip was planted"),
        (ParityRequest("full", "cpu", added=("scan:mine=fused:selective_scan",)), "--with and --rival"),
        (ParityRequest("full", "cpu", rivals=("fused:torch",)), "--with and --rival"),
    ],
)
def test_other_questions_validate_nothing(request_: ParityRequest, said: str, tmp_path: Path) -> None:
    run = made(tmp_path / "run", request_)
    assert said in (stamps.refusal(run) or "") and stamps.write_stamps(run) == []
    assert fused.validation("torch", torch.float32, "cpu") is None


def fail_one(run: Run) -> None:
    last = run.records.pop()
    run.records.append(Record(*last.key[:2], "ours", *last.key[2:], last.dtype, "fail", findings=(BAD,)))


def in_another_session(run: Run, **box: object) -> None:
    run.about["sessions"].append(run.about["sessions"][-1] | {"box": HERE | box})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (fail_one, "1 questions of ours failed"),
        (lambda run: run.records.pop(), "1 questions have no answer"),
        (lambda run: run.finish("interrupted"), "not finished (status: interrupted)"),
        (lambda run: run.finish("finished", ["fingerprints of fused 1, then 2"]), "changed during the run: fingerprints"),
        (lambda run: run.about["box"].update(git={"commit": "c" * 40, "dirty": True}), "commit first"),
        (lambda run: in_another_session(run, cpu="another"), "its sessions differ: cpu "),
    ],
)  # fmt: skip
def test_a_run_that_went_wrong_validates_nothing(change: Change, said: str, tmp_path: Path) -> None:
    run = made(tmp_path / "run", FULL, dict(HERE))
    change(run)
    assert said in (stamps.refusal(run) or "") and stamps.write_stamps(run) == []
    assert fused.validation("torch", torch.float32, "cpu") is None


@pytest.mark.parametrize(
    ("box", "said"),
    [
        ({"fingerprints": HERE["fingerprints"] | {"fused": "9" * 64}}, "made elsewhere: fingerprints of fused 999999999999"),
        ({"fingerprints": HERE["fingerprints"] | {"harness": "9" * 64}}, "made elsewhere: fingerprints of harness"),
        ({"gpu": "NVIDIA H200"}, "made elsewhere: gpu NVIDIA H200, then none"),
        ({"driver": "570.1"}, "made elsewhere: driver"),
        ({"packages": HERE["packages"] | {"torch": "2.0"}}, "made elsewhere: packages of torch 2.0"),
    ],
)
def test_a_run_of_other_code_or_another_box_validates_nothing(box: dict, said: str, tmp_path: Path) -> None:
    run = made(tmp_path / "run", FULL, HERE | box)
    assert said in (stamps.refusal(run) or "") and stamps.write_stamps(run) == []


def test_sources_edited_while_a_run_goes_on_are_noticed_at_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    edited: list[int] = []
    original = HERE["fingerprints"]
    monkeypatch.setattr(environment, "fingerprints", lambda: original | ({"fused": "9" * 64} if edited else {}))
    run = made(tmp_path / "run", FULL, status="interrupted")
    assert conclude(run, Progress({}), lambda: edited.append(1), lambda run: run.folder)
    assert "sources changed during the run" in capsys.readouterr().out
    assert "fused" in (stamps.refusal(run) or "") and stamps.write_stamps(run) == []
    edited.clear()  # and set back since
    reopened = Run.open(run.folder)
    reopened.records = run.records
    assert "sources changed" in (stamps.refusal(reopened) or "")
    assert conclude(again := made(tmp_path / "again", FULL), Progress({}), lambda: None, lambda run: run.folder)
    assert stamps.refusal(again) is None
