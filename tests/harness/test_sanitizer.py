"""The command `sanitize` by a stand-in for NVIDIA's compute-sanitizer: what it says becomes the verdict."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from fused.ops.selective_scan.path import path_of
from harness.cli import sanitize as command
from harness.cli.app import app
from harness.instruments import sanitized, sanitizer
from harness.runs.conclude import FAILED, INTERRUPTED, PASSED, UNFIT
from harness.runs.store import Run

CLEAN = "B2-L9-float32\n========= ERROR SUMMARY: 0 errors\n"
WRITES = """\
========= COMPUTE-SANITIZER
========= Invalid __global__ write of size 4 bytes
=========     at scan_forward+0x1230 in kernels.cu:140
B2-L9-float32
========= ERROR SUMMARY: 3 errors
"""
RACES = """\
========= Error: Race reported between Write access at 0x10 and Read access
========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)
"""


@pytest.mark.parametrize(
    ("output", "code", "errors", "said"),
    [
        (CLEAN, 0, 0, "1 cases"), (WRITES, 9, 3, "Invalid __global__ write"), (RACES, 9, 2, "Race reported"),
        (CLEAN.replace("0 errors", "1 error"), 9, 1, "ERROR SUMMARY: 1 error"),
        (CLEAN, 1, -1, "no errors, but the program ended with 1"), ("", 0, -1, "exit code 0 without a count"),
        ("========= Error: device not supported\n", 255, -1, "exit code 255 without a count of errors"),
    ],
)  # fmt: skip
def test_what_the_tool_says(output: str, code: int, errors: int, said: str) -> None:
    verdict = sanitizer.read(output, code)
    assert verdict.errors == errors and said in verdict.said


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A compute-sanitizer that finds a wrong write in the scan, hangs in a race of the norm, and else finds nothing."""
    path = tmp_path / "bin" / "compute-sanitizer"
    path.parent.mkdir()
    path.write_text(
        '#!/bin/sh\ncase "$*" in\n'
        f'*memcheck*"sanitized scan") printf "{WRITES.encode("unicode_escape").decode()}"; exit 9;;\n'
        f'*racecheck*"sanitized norm") touch "{tmp_path / "hangs"}"; sleep 600;;\n'
        f'*) printf "{CLEAN.encode("unicode_escape").decode()}";;\nesac\n'
    )
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{path.parent}:{os.environ['PATH']}")
    monkeypatch.setattr(command, "require_device", lambda device: device)
    monkeypatch.setattr(command, "SECONDS", 1.0)
    return path


def test_a_run_and_its_page(stand_in: Path, tmp_path: Path) -> None:
    words = ["sanitize", "--subject", "scan", "--subject", "norm", "--jobs", "4"]
    done = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "run")])
    assert done.exit_code == FAILED, done.output
    found = {(r.subject, r.check): (r.status, r.reason) for r in Run.open(tmp_path / "run").records}
    assert found.pop(("scan", "memcheck"))[0] == "fail" and found.pop(("norm", "racecheck")) == ("error", "no end after 1 s")
    assert set(found.values()) == {("pass", "")} and len(found) == 4
    page = (tmp_path / "run" / "report.md").read_text()
    assert "| scan | 3 errors" in page and "Invalid __global__ write" in page and "not judged" in page
    assert "1 of 5 runs of kernels has errors. 1 could not be judged." in page and "](tools.svg)" in page
    again = [*words[:3], "--jobs", "1", "--tool", "synccheck", "--out", str(tmp_path / "b")]
    assert CliRunner().invoke(app, again).exit_code == PASSED


def test_what_is_watched_ends_with_an_interrupt(stand_in: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the verdicts that came before are kept."""
    monkeypatch.setattr(command, "SECONDS", 60.0)
    records = tmp_path / "run" / "records.jsonl"
    ended = threading.Event()

    def interrupt() -> None:
        """Send Ctrl-C while the race is watched, which is never before the handler is there."""
        while not ended.wait(0.02):
            if records.exists() and b"\n" in records.read_bytes() and (tmp_path / "hangs").exists():
                return os.kill(os.getpid(), signal.SIGINT)

    words = ["--subject", "norm", "--tool", "memcheck", "--tool", "racecheck", "--jobs", "2", "--out", str(tmp_path / "run")]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background hands on that it is ignored
    begun, thread = time.monotonic(), threading.Thread(target=interrupt)
    thread.start()
    try:
        done = CliRunner().invoke(app, ["sanitize", *words])
    finally:
        ended.set()
        thread.join()
        signal.signal(signal.SIGINT, before)
    run = Run.open(tmp_path / "run")
    assert done.exit_code == INTERRUPTED and run.about["status"] == "interrupted" and time.monotonic() - begun < 30
    assert [(r.check, r.status) for r in run.records] == [("memcheck", "pass")]
    assert not any(b"sanitized norm" in p.read_bytes() for p in Path("/proc").glob("[0-9]*/cmdline") if p.exists())


def test_without_the_tool_or_with_a_wrong_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sanitizer, "program", lambda: None)
    assert CliRunner().invoke(app, ["sanitize", "--out", str(tmp_path / "a")]).exit_code == UNFIT
    assert sanitizer.watch("memcheck", "scan", 1.0).errors == -1
    wrong = CliRunner().invoke(app, ["sanitize", "--tool", "helgrind", "--out", str(tmp_path / "a")])
    assert "memcheck, racecheck" in str(wrong.exception) and not (tmp_path / "a").exists()


@pytest.mark.parametrize("subject", ["scan", "mixer"])
def test_the_program_runs_every_kind_of_case(subject: str, capsys: pytest.CaptureFixture[str]) -> None:
    """By PyTorch's operators, on the CPU."""
    before = torch.are_deterministic_algorithms_enabled()
    assert sanitized.main(subject, "cpu", "fused:torch") == 0
    torch.use_deterministic_algorithms(before)
    names = capsys.readouterr().out.split()
    assert names == [case.name for case in sanitized.cases_of(subject)] and any("bfloat16" in name for name in names)
    assert subject != "scan" or "L300" in names[-1]
    assert sanitized.main(subject, "cpu", "fused:native") == 4


def test_state_passes_by_moments_are_watched_on_every_path() -> None:
    """No smoke case is long enough for them."""
    watched = [case for case in sanitized.cases_of("mixer") if case["L"] >= 8192]
    assert {"fresh", "long-memory", "worst-case", "rescan"} <= {option for case in watched for option in case.options}
    assert all(case.has("infer") and case.dtype == "bfloat16" and case.only_check == "" for case in watched)
    for case in watched:
        assert "by moments" in path_of(case["B"], case["L"], 2 * case["D"], torch.bfloat16, 132)
