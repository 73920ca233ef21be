"""Runs in several sessions: however each ends, `--resume` goes on, from another copy of the checkout too, and the whole is
accepted as one run, unless a session was of other code or of another box."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fused import stamp
from harness.bench import grids
from harness.bench import run as bench_run
from harness.cli.app import app
from harness.records.finding import Finding
from harness.records.record import Record
from harness.records.speed import Entry, Point, Speed
from harness.report.accepted import MARKERS
from harness.runs import acceptance, environment, sessions
from harness.runs.conclude import INTERRUPTED, PASSED
from harness.runs.store import Run, StoreError, begin

ROOT = Path(__file__).resolve().parents[2]
PARITY = "parity --grid smoke --device cpu --subject scan --impl fused:torch --case B3-L7-*state-float32 --check forward \
 --check backward --check chunks".split()  # fmt: skip
BENCH = "bench --race norm --budget 0.01 --device cpu".split()
BOX = {"gpu": "NVIDIA H200", "driver": "570.1", "cpu": "a CPU", "cores": 16, "packages": {"torch": "2.11.0"},
       "fingerprints": {"reference": "1" * 64, "fused": "2" * 64, "harness": "3" * 64}}  # fmt: skip


@pytest.fixture(scope="module")
def checkouts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two copies of the packages with one commit, and a page for numbers."""
    one, other = (tmp_path_factory.mktemp(name) / "copy" for name in ("one", "other"))
    for name in ("reference", "fused", "harness", "tests/data"):
        shutil.copytree(ROOT / name, one / name)  # compiled files too, which saves seconds
    (one / ".gitignore").write_text("__pycache__/\n/reports/\n")
    (one / "reports").mkdir()
    (one / "reports" / "README.md").write_text("\n".join(MARKERS))
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "all"]):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@localhost", *words], cwd=one, check=True)
    shutil.copytree(one, other)
    return one, other


class Command:
    """`python -m harness WORDS` from a checkout, in a process group of its own."""

    def __init__(self, checkout: Path, *words: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "harness", *words], cwd=checkout, env=os.environ | {"PYTHONPATH": str(checkout)}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip

    def wait_for(self, reached: Callable[[], bool]) -> "Command":
        """Wait until something is reached before the command ends."""
        while not reached():
            assert self._process.poll() is None, self._process.communicate()
            time.sleep(0.02)
        return self

    def terminate(self) -> tuple[int, str]:
        """End it as `timeout` does: SIGTERM to the process, then to its group."""
        self._process.terminate()
        os.killpg(self._process.pid, signal.SIGTERM)
        return self.end()

    def kill(self) -> None:
        """End it by kill -9, its workers left to themselves."""
        self._process.kill()
        self._process.communicate(timeout=60)

    def end(self) -> tuple[int, str]:
        """Wait for its end; return its exit code and what it printed."""
        said, _ = self._process.communicate(timeout=240)
        return self._process.returncode, said


def lines(folder: Path, name: str = "records.jsonl") -> int:
    return (folder / name).read_bytes().count(b"\n") if (folder / name).exists() else 0


def test_a_parity_run_in_sessions_of_two_checkouts_is_accepted_as_one(
    checkouts: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = checkouts
    run = tmp_path / "in-parts"
    words = [*PARITY, "--out", str(run)]
    code, said = Command(one, *words, "--jobs", "2").wait_for(lambda: lines(run) > 0).terminate()
    assert code == INTERRUPTED and f"--resume --out {run}" in said, said
    assert "Interrupted" in (run / "report.md").read_text()
    with pytest.raises(StoreError, match=r"is not a finished run \(status: interrupted\); continue with: "):
        acceptance.commit_of(Run.open(run))

    before = lines(run)
    Command(other, *words, "--jobs", "1", "--resume").wait_for(lambda: lines(run) > before).kill()
    with open(run / "records.jsonl", "a") as file:
        file.write('{"subject": "sc')  # as the kill would leave a line that was being written
    real = stamp.fingerprint
    with monkeypatch.context() as patch:
        patch.setattr(stamp, "fingerprint", lambda name: "9" * 64 if name == "reference" else real(name))
        refused = CliRunner().invoke(app, [*words, "--resume"])
    assert isinstance(refused.exception, StoreError) and "cannot be continued" in str(refused.exception), refused.output
    assert "fingerprints of reference" in str(refused.exception)

    code, said = Command(other, *words, "--jobs", "1", "--resume").end()
    assert code == PASSED and "\n9 passed, 0 failed" in said, said  # Triton 3.9 prints of itself after the last line
    found = Run.open(run)
    assert [s["status"] for s in found.about["sessions"]] == ["interrupted", "killed", "finished"]
    assert ["--resume" in s["command"] for s in found.about["sessions"]] == [False, True, True]
    assert len({r.key for r in found.records}) == len(found.records) == lines(run)
    assert "| sessions | 3: " in (page := (run / "report.md").read_text()) and "Interrupted" not in page
    code, said = Command(one, "accept", str(run)).end()
    kept = one / "reports" / "accepted" / "cpu" / "in-parts"
    assert code == 0 and said.splitlines()[0] == str(kept), said
    assert "covers parity of grid smoke; subjects scan; checks forward, backward, chunks; names fused:torch; cases B3" in said
    assert {"run.json", "records.jsonl", "report.md", "report.html"} <= {f.name for f in kept.iterdir()}
    assert len(json.loads((kept / "run.json").read_text())["commit"]) == 40


def test_an_interrupted_case_keeps_the_questions_that_were_answered(checkouts: tuple[Path, Path], tmp_path: Path) -> None:
    """One case, whose second question takes for ever."""
    one, run = checkouts[0], tmp_path / "stuck"
    (one / "stuck_scan.py").write_text(
        "import time\n\nimport torch\n\nfrom fused import selective_scan\n\n\n"
        "def scan(*args, **options):\n"
        "    if any(torch.is_tensor(x) and x.requires_grad for x in args):\n"
        "        time.sleep(3600)\n"
        "    return selective_scan(*args, **options)\n"
    )
    words = ["parity", "--subject", "scan", "--case", "B2-L1-E6-N4-float32", "--with", "scan:stuck=stuck_scan:scan"]
    words += ["--impl", "stuck", "--check", "forward", "--check", "writes"]
    command = Command(one, *words, "--jobs", "2", "--out", str(run))
    deadline = time.monotonic() + 120
    command.wait_for(lambda: lines(run) > 0 or time.monotonic() > deadline)
    code, said = command.terminate()
    assert code == INTERRUPTED and [r.check for r in Run.open(run).records] == ["forward"], said


def test_a_bench_may_be_interrupted_while_the_box_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["harness", *BENCH])
    monkeypatch.setattr(bench_run, "measure_box", lambda *_: signal.raise_signal(signal.SIGTERM))
    done = CliRunner().invoke(app, [*BENCH, "--out", str(tmp_path / "run")])
    assert done.exit_code == INTERRUPTED and f"--resume --out {tmp_path / 'run'}" in done.output, done.output
    assert "Interrupted" in (tmp_path / "run" / "report.md").read_text()


def test_a_bench_in_sessions_of_two_checkouts_is_accepted_as_one(checkouts: tuple[Path, Path], tmp_path: Path) -> None:
    one, other = checkouts
    run = tmp_path / "timed"
    words = [*BENCH, "--out", str(run)]
    code, said = Command(other, *words).wait_for(lambda: lines(run, "speeds.jsonl") > 0).terminate()
    assert code == INTERRUPTED and f"--resume --out {run}" in said and "Interrupted" in (run / "report.md").read_text(), said
    timed = (run / "speeds.jsonl").read_text()
    assert '"error"' not in timed  # of processes that the signal reached too
    code, said = Command(one, *words, "--resume").end()
    points = Run.open(run).speeds  # of each implementation of ours
    assert code == PASSED and len({p.key for p in points}) == len(points) == lines(run, "speeds.jsonl"), said
    assert {p.point.name for p in points} == {p.name for p in grids.points("cpu") if p.race == "norm"}
    assert f"\n{len(points)} timed" in said and all(p.status == "ok" for p in points), said
    assert (run / "speeds.jsonl").read_text().startswith(timed)
    code, said = Command(other, "accept", str(run)).end()
    assert code == 0, said
    assert "norm: on one" in (page := (other / "reports" / "README.md").read_text()) and "accepted/cpu/timed/report.md" in page


def finished(folder: Path, boxes: list[dict], status: str = "finished", **plan: object) -> Run:
    """A run with a session on each box."""
    about = {"kind": "parity", "plan": {"grid": "smoke", "mutant": ""} | plan, "box": boxes[0]}
    run = begin(about, ["parity"], folder)
    for box in boxes[1:]:
        run.finish("interrupted")
        run.about["sessions"].append(sessions.begun(about | {"box": box, "command": "python -m harness parity --resume"}))
    run.finish(status)
    return run


@pytest.fixture
def committed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The code of BOX stands here in a clean commit."""
    monkeypatch.setattr(environment, "git", lambda: {"commit": "c" * 40, "dirty": False})
    monkeypatch.setattr(stamp, "fingerprint", BOX["fingerprints"].get)


@pytest.mark.parametrize(
    ("planted", "said"),
    [
        ({"driver": "580.2"}, "driver 570.1, then 580.2"),
        ({"cpu": "another CPU"}, "cpu a CPU, then another CPU"),
        ({"packages": {"torch": "2.12.0"}}, "packages of torch 2.11.0, then 2.12.0"),
        ({"fingerprints": BOX["fingerprints"] | {"fused": "9" * 64}}, "fingerprints of fused 222222222222, then 999999999999"),
    ],
)
@pytest.mark.usefixtures("committed")
def test_a_session_that_differs_is_refused(planted: dict, said: str, tmp_path: Path) -> None:
    run = finished(tmp_path / "mixed", [BOX, BOX, BOX | planted])
    with pytest.raises(StoreError, match=f"session 3, started .* differs in {said}; run it anew") as refused:
        acceptance.commit_of(Run.open(run.folder))
    assert "mixes two codes or boxes" in str(refused.value)
    earlier = finished(tmp_path / "earlier", [BOX], status="interrupted")
    with pytest.raises(StoreError, match=f"cannot be continued.*{said}; .*new run without --resume"):
        begin(earlier.about | {"box": BOX | planted}, ["parity"], None, earlier)
    assert len(Run.open(earlier.folder).about["sessions"]) == 1


@pytest.mark.usefixtures("committed")
def test_what_may_be_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = finished(tmp_path / "whole", [BOX, BOX])
    assert acceptance.commit_of(whole) == "c" * 40
    for run, said in (
        (finished(tmp_path / "running", [BOX], status="running"), "not a finished run .status: running.; continue with"),
        (finished(tmp_path / "planted", [BOX], mutant="drop_skip"), "the bug drop_skip was planted"),
        (finished(tmp_path / "other", [BOX | {"fingerprints": {"fused": "4"}}]), "made by other code than commit cccccccccc"),
    ):
        with pytest.raises(StoreError, match=said):
            acceptance.commit_of(run)
    for git in ({"commit": "c" * 40, "dirty": True}, {"commit": None, "dirty": None}):
        monkeypatch.setattr(environment, "git", lambda git=git: git)
        with pytest.raises(StoreError, match="must stand in git as they are here: commit first"):
            acceptance.commit_of(whole)


def a_record(role: str) -> Record:
    return Record("scan", "x", role, "forward", "c", "float32", "fail", findings=(Finding("y", "l2", 3.0, 2.0),))


def a_speed(role: str, status: str) -> Speed:
    return Speed(Entry("norm", "x", role), Point("norm", (("B", 1), ("L", 2)), "infer"), status, reason="planted")


@pytest.mark.parametrize("package", ["reference", "fused", "harness"])
@pytest.mark.usefixtures("committed")
def test_a_run_of_other_code_is_refused(package: str, tmp_path: Path) -> None:
    other = finished(tmp_path / "other", [BOX | {"fingerprints": BOX["fingerprints"] | {package: "9" * 64}}])
    with pytest.raises(StoreError, match=f"made by other code than commit cccccccccc .{package} differ"):
        acceptance.commit_of(other)


@pytest.mark.parametrize("status", ["fail", "error", "oom", "timeout"])
@pytest.mark.usefixtures("committed")
def test_a_run_in_which_ours_failed_is_refused(status: str, tmp_path: Path) -> None:
    run = finished(tmp_path / "run", [BOX])
    run.add(a_record("rival"))
    assert acceptance.commit_of(run) == "c" * 40
    run.add(replace(a_record("ours"), status=status, reason="planted"))
    with pytest.raises(StoreError, match="is no evidence: 1 of ours failed, see .*report.md"):
        acceptance.commit_of(run)


@pytest.mark.parametrize(("status", "allowed"), [("gated", False), ("error", False), ("timeout", False), ("oom", True)])
@pytest.mark.usefixtures("committed")
def test_a_bench_in_which_ours_was_not_timed_is_refused(status: str, allowed: bool, tmp_path: Path) -> None:
    run = finished(tmp_path / "run", [BOX])
    run.add_speed(a_speed("rival", status))
    assert acceptance.commit_of(run) == "c" * 40
    run.add_speed(a_speed("ours", status))
    with contextlib.nullcontext() if allowed else pytest.raises(StoreError, match="1 of ours failed"):
        acceptance.commit_of(run)


@pytest.mark.usefixtures("committed")
def test_sources_that_changed_or_were_in_no_commit_are_refused(tmp_path: Path) -> None:
    run = finished(tmp_path / "run", [BOX, BOX])
    run.about["sessions"][0]["changed"] = ["fingerprints of fused 1, then 2"]
    with pytest.raises(StoreError, match=r"changed during the run: fingerprints of fused 1, then 2 .session 1.; run it anew"):
        acceptance.commit_of(run)
    dirty = finished(tmp_path / "dirty", [BOX, BOX | {"git": {"commit": "d" * 40, "dirty": True}}])
    with pytest.raises(StoreError, match="made by sources that differed from their commit; commit first"):
        acceptance.commit_of(dirty)
    unknown = finished(tmp_path / "unknown", [BOX | {"git": {"commit": None, "dirty": None}}])  # without git the hashes tell
    assert acceptance.commit_of(unknown) == "c" * 40


def test_what_an_accepted_run_covers_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "describe", lambda device: BOX)
    narrowed = finished(tmp_path / "here", [BOX], subjects=["scan", "conv"], video="")
    assert acceptance.coverage(narrowed) == ["covers parity of grid smoke; subjects scan, conv"]
    [_, said] = acceptance.coverage(finished(tmp_path / "there", [BOX | {"driver": "580.2"}]))
    assert said == "covers another box than this, NVIDIA H200: driver 570.1, then 580.2"


def test_a_run_from_before_sessions_had_one(tmp_path: Path) -> None:
    run = finished(tmp_path, [BOX], status="interrupted")
    del run.about["sessions"]
    run.save()
    old = Run.open(tmp_path)
    [session] = sessions.of(old.about)
    assert session["status"] == "interrupted" and not sessions.differences(old.about["box"], session["box"])
    assert len(begin(old.about, ["parity", "--resume"], None, old).about["sessions"]) == 2


@pytest.mark.usefixtures("undrawn")
def test_accepted_runs_render(tmp_path: Path) -> None:
    """Those that stand as evidence, written by earlier versions too."""
    kept = sorted((ROOT / "reports" / "accepted").glob("*/*/run.json"))
    assert kept
    for path in kept:
        copy = tmp_path / path.parent.name
        copy.mkdir()
        for name in ("run.json", "records.jsonl", "speeds.jsonl"):
            if (path.parent / name).exists():
                shutil.copy(path.parent / name, copy)
        done = CliRunner().invoke(app, ["report", str(copy)])
        assert done.exit_code == 0 and done.output.strip() == str(copy / "report.md"), (path, done.exception)
        first = (path.parent / "report.md").read_text().splitlines()
        assert (copy / "report.md").read_text().splitlines()[:5] == first[:5], path


def test_the_page_of_reports_names_every_run_and_no_other() -> None:
    page = (ROOT / "reports" / "README.md").read_text()
    linked = {ROOT / "reports" / path for path in re.findall(r"\]\((accepted/[^)]*)\)", page)}
    assert all(path.is_file() for path in linked) and all(marker in page for marker in MARKERS)
    assert {path.parent for path in linked} == {path.parent for path in (ROOT / "reports" / "accepted").glob("*/*/run.json")}
