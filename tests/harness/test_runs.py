"""Runs by their folders: which is continued, what is recorded of the machine and its code, and how commands end."""

import json
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import sweeps
import torch
from typer.testing import CliRunner

from harness.cli import app as command_line
from harness.cli.app import app
from harness.judge.parity import describe
from harness.judge.registry import subjects
from harness.judge.request import ParityRequest
from harness.records.speed import Entry, Point, Speed
from harness.runs import acceptance, environment, sessions, store
from harness.runs.conclude import FAILED, INTERRUPTED, NOTHING, PASSED, UNFIT, USAGE, conclude
from harness.runs.progress import Progress
from harness.runs.store import Run, StoreError, begin, command, unfinished

ABOUT = {"kind": "parity", "plan": {"grid": "smoke"}, "box": {"gpu": "a GPU"}}


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder where runs are kept without --out."""
    monkeypatch.setattr(store, "RUNS", tmp_path / "runs")
    return tmp_path / "runs"


def made(folder: Path, status: str, kind: str = "parity") -> Run:
    run = Run.create(folder, ABOUT | {"kind": kind})
    if status != "running":
        run.finish(status)
    return run


def test_resume_means_the_newest_unfinished_run_of_its_kind(runs: Path) -> None:
    for name, status, kind in (
        ("20260101-000000-parity", "interrupted", "parity"), ("20260103-000000-parity", "interrupted", "parity"),
        ("20260104-000000-parity", "finished", "parity"), ("20260105-000000-bench", "interrupted", "bench"),
    ):  # fmt: skip
        made(runs / name, status, kind)
    assert unfinished(None, "parity").folder.name == "20260103-000000-parity"
    assert unfinished(None, "bench").folder.name == "20260105-000000-bench"
    assert Run.latest().folder.name == "20260105-000000-bench"
    assert unfinished(runs / "20260101-000000-parity", "parity").folder.name == "20260101-000000-parity"
    with pytest.raises(StoreError, match="there is no unfinished run under"):
        unfinished(None, "learn")


def test_a_folder_holds_one_run(runs: Path) -> None:
    run = made(runs / "a b", "finished")
    with pytest.raises(StoreError, match="already holds a run; continue it with --resume"):
        Run.create(run.folder, ABOUT)
    begun = begin(ABOUT, ["parity", "--out", "x", "--grid", "smoke", "--out=y"], None)
    assert begun.about["command"] == "python -m harness parity --grid smoke" == command(["parity", "--grid", "smoke"])
    assert begun.folder.parent == runs and begun.folder.name.endswith("-parity")
    run.about["command"] = begun.about["command"]
    assert run.how_to_continue == f"continue with: python -m harness parity --grid smoke --resume --out '{run.folder}'"
    assert begin(ABOUT, ["parity"], None).folder != begun.folder, "two runs of one second"


def test_a_session_that_was_killed_is_told_so(tmp_path: Path) -> None:
    made(tmp_path, "running")
    again = Run.open(tmp_path)
    again.resume(ABOUT)
    assert [s["status"] for s in Run.open(tmp_path).about["sessions"]] == ["killed", "running"]
    for key, value in (("plan", {"grid": "full"}), ("kind", "bench"), ("box", {"gpu": "another"})):
        with pytest.raises(StoreError):
            Run.open(tmp_path).resume(ABOUT | {key: value})


@pytest.mark.parametrize("key", ["gpu", "multiprocessors", "driver", "cuda", "cpu", "cores", "python"])
def test_whatever_differs_between_boxes_is_said(key: str) -> None:
    assert sessions.differences({key: "a"}, {key: "b"}) == [f"{key} a, then b"]
    assert sessions.differences({key: "a"}, {}) == [f"{key} a, then none"]
    assert sessions.differences({key: "a"}, {key: "a"}) == []
    packages = sessions.differences({"packages": {"torch": "1"}}, {"packages": {"torch": "1", "triton": "3"}})
    assert packages == ["packages of triton none, then 3"]
    assert sessions.differences({"threads": 1}, {"threads": 2}) == [], "the plan holds them"


@pytest.mark.parametrize("which", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_says_so_and_keeps_its_report(which: signal.Signals, tmp_path: Path) -> None:
    run, written = made(tmp_path, "running"), []
    before = signal.signal(which, signal.default_int_handler)
    try:
        done = conclude(run, Progress({}), lambda: signal.raise_signal(which), lambda run: written.append(1) or run.folder)
        assert signal.getsignal(which) is signal.default_int_handler
    finally:
        signal.signal(which, before)
    assert not done and written == [1] and Run.open(tmp_path).about["status"] == "interrupted"


def test_what_a_checkout_has_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Changed files and new ones, in each of the three packages; without git nothing is known."""
    git = shutil.which("git")
    assert git
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert environment.git() == {"commit": None, "dirty": None}
    for name in ("reference", "fused", "harness"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.py").write_text("")
    author = ("-c", "user.name=a", "-c", "user.email=a@localhost")
    for words in (["init", "-q"], ["add", "."], [*author, "commit", "-q", "-m", "all"]):
        subprocess.run([git, *words], cwd=tmp_path, check=True)
    (tmp_path / "notes.md").write_text("")
    found = environment.git()
    assert found["dirty"] is False and len(found["commit"]) == 40
    for name in ("reference", "fused", "harness"):
        for file, text in (("a.py", "1"), ("new.py", "")):
            path = tmp_path / name / file
            path.write_text(text)
            assert environment.git()["dirty"] is True, path
            path.unlink()
            (tmp_path / name / "a.py").write_text("")


def test_judging_is_set_up(monkeypatch: pytest.MonkeyPatch) -> None:
    matmul = torch.backends.cuda.matmul
    before = torch.are_deterministic_algorithms_enabled(), matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.benchmark = True
    torch.use_deterministic_algorithms(False)
    try:
        environment.prepare()
        expected = {"tf32": False, "deterministic": True, "cudnn_benchmark": False, "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
        assert environment.settings() == expected
        torch.backends.cudnn.allow_tf32 = True
        assert environment.settings()["tf32"] is True
    finally:
        torch.use_deterministic_algorithms(before[0])
        matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before[1:]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda patch: patch.setattr(torch, "__version__", "2.7.1+cpu"), "torch is 2.7.1+cpu; 2.8 or newer"),
        (lambda patch: patch.setattr(torch, "__version__", "1.13.0"), "torch is 1.13.0"),
        (lambda patch: patch.setattr(environment, "ROOT", Path("/elsewhere")), "`import fused` finds"),
    ],
)
def test_a_machine_that_is_unfit_judges_nothing(change, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert environment.unfit() == []
    change(monkeypatch)
    assert any(said in reason for reason in environment.unfit())
    monkeypatch.setattr(acceptance, "ACCEPTED", tmp_path)  # else doctor compares every run there with the sources
    out = tmp_path / "run"
    for words in (["doctor"], ["parity", "--subject", "norm", "--out", str(out)]):
        done = CliRunner().invoke(app, words)
        assert done.exit_code == UNFIT and said in done.stderr and not (out / "run.json").exists()


def test_the_request_is_recorded_with_what_it_left_out() -> None:
    for request, filtered in ((ParityRequest("full", "cpu"), False), (ParityRequest("full", "cpu", ("norm",)), True)):
        about = describe(request, {"gpu": None})
        assert about["filtered"] is filtered and about["plan"]["subjects"] == request.subjects and about["box"] == {"gpu": None}


def test_a_run_goes_on_with_its_number_of_threads(tmp_path: Path) -> None:
    words = ["parity", "--grid", "smoke", "--device", "cpu", "--jobs", "1", "--subject", "norm", "--check", "forward",
             "--case", "B1-L1-D32-kind=rms-float32", "--impl", "fused:torch", "--out", str(tmp_path)]  # fmt: skip
    torch.set_num_threads(2)
    assert CliRunner().invoke(app, words).exit_code == PASSED
    assert Run.open(tmp_path).about["plan"]["threads"] == 2
    torch.set_num_threads(1)
    assert CliRunner().invoke(app, [*words, "--resume"]).exit_code == PASSED


def test_a_wrong_option_exits_with_2(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["harness", "parity", "--subject", "nobody"])
    with pytest.raises(SystemExit) as ended:
        command_line.main()
    assert ended.value.code == USAGE == 2 and capsys.readouterr().err.startswith("error: subject 'nobody' is unknown; allowed")
    assert (PASSED, FAILED, NOTHING, UNFIT, INTERRUPTED) == (0, 1, 3, 4, 130)


def test_rivals_are_those_of_others() -> None:
    roles = {i.name: i.role for s in subjects().values() for i in s.implementations()}
    assert {name for name, role in roles.items() if role == "rival"} >= {"fused:mamba_ssm", "sdpa"}
    assert all(roles[name] == "ours" for name in ("reference", "fused:torch", "fused:native", "fused:native_kept"))


def timed(folder: Path, factor: float, role: str, names: tuple[str, ...] = ("a", "b")) -> Run:
    """A bench of points of a second each, times a factor."""
    run = Run.create(folder, {"kind": "bench", "plan": {}, "box": {"gpu": "a GPU", "cpu": "a CPU"}})
    for i, name in enumerate(names):
        point = Point("norm", (("B", 1), ("L", 8 + i)), "infer")
        run.add_speed(Speed(Entry("norm", name, role), point, "ok", tuple(s * factor for s in sweeps.taken(1.0))))
    return run


@pytest.mark.parametrize(
    ("factor", "role", "code", "word"),
    [
        (1.5, "ours", FAILED, "SLOWER"), (1.5, "rival", PASSED, "SLOWER"), (0.5, "ours", PASSED, "FASTER"),
        (1.0, "ours", PASSED, "SAME"),
    ],
)  # fmt: skip
def test_compare_exits_by_what_is_slower_of_ours(factor: float, role: str, code: int, word: str, tmp_path: Path) -> None:
    for name, times in (("base", 1.0), ("new", factor)):
        timed(tmp_path / name, times, role)
    done = CliRunner().invoke(app, ["compare", str(tmp_path / "base"), str(tmp_path / "new")])
    assert done.exit_code == code and f"2 {word}" in done.output, done.output
    timed(tmp_path / "other", 1.0, role, ("c",))
    done = CliRunner().invoke(app, ["compare", str(tmp_path / "base"), str(tmp_path / "other")])
    assert done.exit_code == NOTHING and "left out: norm c" in done.output
    assert done.output.count("only in") == 3 and f"only in {tmp_path / 'base'}" in " ".join(done.output.split())


def test_a_record_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    run = timed(tmp_path, 1.0, "ours")
    assert Run.open(tmp_path).speeds == run.speeds
    path = tmp_path / "speeds.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    older = [{k: v for k, v in line.items() if k not in ("host", "bound_by")} for line in lines]
    path.write_text("".join(json.dumps(line) + "\n" for line in older))
    assert Run.open(tmp_path).speeds == [replace(s, host=(), bound_by="") for s in run.speeds]


def test_a_folder_without_a_run_is_told_from_none(tmp_path: Path) -> None:
    for folder, why in ((tmp_path, "it has no run.json"), (tmp_path / "none", "there is no such folder")):
        with pytest.raises(StoreError, match=f"{re.escape(str(folder))} holds no run: {why}"):
            Run.open(folder)
