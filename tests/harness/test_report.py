"""The page of a run: what must be loud is, the numbers stand where they belong, the figures exist."""

import math

import pytest

from harness.judge import parity
from harness.records.finding import Finding
from harness.records.record import Record
from harness.report import deviation, figures, page
from harness.runs.store import Run

COMMAND = "python -m harness parity --grid full --subject scan --check backward --impl fused:torch --case B1-L63-E4-N2-bfloat16"
GOOD = Finding("y", "l2", 1e-7, 4e-7, 1.0, (0, 1))
BAD = Finding("delta.grad", "max", 3e-2, 1e-2, 2.0, (0, 62, 3))
BAD_L2 = Finding("delta.grad", "l2", 2e-2, 1e-2, 2.0, (0, 62, 3))
BOX = {
    "device": "cuda", "gpu": "NVIDIA H200", "driver": "570.1", "cpu": "a CPU", "packages": {"torch": "2.8.0", "timm": None},
    "fingerprints": {"fused": "abc123"}, "settings": {"tf32": False}, "git": {"commit": "f00d", "dirty": True},
}  # fmt: skip


def record(status="pass", check="forward", name="fused:torch", case="B1-L63-E4-N2-float32", role="ours", **rest):
    rest = {"findings": (GOOD,)} | rest if status == "pass" else rest
    return Record("scan", name, role, check, case, case.rpartition("-")[2], status, seconds=1.5, **rest)


def made(folder, records, status="finished", **about):
    plan = {"grid": "full", "device": "cuda", "mutant": "", "video": "", "threads": 1}
    given = {"kind": "parity", "plan": plan | about.pop("plan", {}), "box": BOX, "filtered": False}
    run = Run.create(folder, given | {"command": "python -m harness parity"} | about)
    for r in records:
        run.add(r)
    run.finish(status)
    return run


@pytest.fixture
def run(tmp_path):
    return made(tmp_path, [
        record("skip", "all", "fused:mamba_ssm", "", "rival", reason="mamba_ssm is not installed"),
        record(),
        record(case="B1-L63-E4-N2-video-bfloat16"),
        record("fail", "backward", case="B1-L63-E4-N2-bfloat16", findings=(GOOD, BAD, BAD_L2), command=COMMAND),
        record("pass", "backward", findings=(GOOD,)),
        record("skip", "chunks", reason="no | state"),
        record("skip", "chunks", case="B1-L7-E4-N2-float32", reason="no | state"),
        record("error", "forward", "other", role="rival", reason="RuntimeError: two\nlines <b>", command="again other"),
    ])  # fmt: skip


def text(run):
    path = page.write(run)
    assert path == run.folder / "report.md"
    return path.read_text()


def test_verdict_names_rivals_in_the_same_breath(run):
    lines = text(run).splitlines()
    assert lines[0] == "# Parity: grid full on NVIDIA H200"
    assert lines[2] == "**FAILED.** ours: 3 passed, 1 failed, 2 skipped; rivals: 0 passed, 1 failed, 1 skipped"
    assert lines[4] == "`3 passed, 1 failed, 2 skipped (rivals: 0 passed, 1 failed)`"


def test_what_did_not_run_is_said_before_the_tables(run):
    said = text(run)
    assert "> **NOT RUN HERE.** These were not judged at all:\n>\n" in said
    assert "> - scan: **fused:mamba_ssm** (rival): mamba_ssm is not installed\n" in said
    assert said.index("## Not run here") < said.index("## Checks")
    assert not any(word in said for word in ("INTERRUPTED", "FILTERED", "PLANTED", "NOT FINISHED"))


def test_matrix(run):
    lines = text(run).splitlines()
    begin = lines.index("### scan") + 2
    assert lines[begin : begin + 5] == [
        "| check | fused:mamba_ssm (rival) (not run) | fused:torch | other (rival) |",
        "| --- | --- | --- | --- |",
        "| forward | - | 2 pass | **1 FAILED** of 1 |",
        "| backward | - | **1 FAILED** of 2 | - |",
        "| chunks | - | 2 skip | - |",
    ]


def test_failures_with_the_command_ours_first(run):
    said = text(run)
    assert (
        f"""\
1. **FAIL** (ours) backward, scan, fused:torch, B1-L63-E4-N2-bfloat16

   delta.grad, max: error 0.03, may be 0.01 (3 budgets), worst at (0, 62, 3); 2 of 3 findings fail

   ```
   {COMMAND}
   ```

2. **ERROR** (rival) forward, scan, other, B1-L63-E4-N2-float32

   reason: RuntimeError: two lines &lt;b>

   ```
   again other
   ```
"""
        in said
    )


def test_worst_errors_skips_video_and_box(run):
    said = text(run)
    assert "| scan | backward | fused:torch | bfloat16 | **3** | delta.grad (max) | B1-L63-E4-N2-bfloat16 |" in said
    assert "| scan | forward | fused:torch | float32 | 0.25 | y (l2) | B1-L63-E4-N2-float32 |" in said
    assert "| 2 | scan | fused:torch | no \\| state |" in said
    assert "1 case used frames of a real video: the shipped clip, `bigbuckbunny.mp4`." in said
    assert "| git | f00d, WITH CHANGES |" in said and "| packages | torch 2.8.0, timm none |" in said
    assert said.endswith("## Again\n\n```\npython -m harness parity\n```\n")


def test_figures_are_drawn_and_shown(run):
    assert "![Error against sequence length](error-vs-length.png)" in text(run)
    assert (run.folder / "error-vs-length.png").read_bytes().startswith(b"\x89PNG")
    svg = (run.folder / "error-vs-length.svg").read_text()
    assert all(word in svg for word in ("fused:torch", "bfloat16", "least budget, float32", "FAILED", "tokens"))
    assert "NOT DRAWN, without a finite number: 1 FAILED" in svg  # the rival's error


def test_deviation_of_the_approximate_mode_is_drawn(tmp_path):
    near = [
        Finding(f"chunks of {chunk}, {ahead} ahead", "deviation", 0.3 / chunk, math.inf, 1.0)
        for chunk in (1, 2) for ahead in (0, 4)
    ]  # fmt: skip
    one = record(check="forward_approximate", findings=parity.selected_findings([GOOD, *near]))
    run = made(tmp_path / "run", [Record.parse(one.line())])
    assert "![Deviation against chunk and look-ahead](approximate.png)" in text(run)
    svg = (run.folder / "approximate.svg").read_text()
    assert all(word in svg for word in ("no look-ahead", "4 frames ahead", "chunk (frames)"))
    assert deviation.measured(run.records[0]) == {0: {1: 0.3, 2: 0.15}, 4: {1: 0.3, 2: 0.15}}
    assert deviation.approximate([record()], tmp_path) == []


def test_interrupted_filtered_and_planted_are_loud(tmp_path):
    plan = {"grid": "smoke", "mutant": "half_decay", "subjects": ["scan"], "video": "my.mp4"}
    said = text(made(tmp_path, [record(case="B1-L7-video-float32")], "interrupted", plan=plan, filtered=True))
    assert "**PASSED SO FAR (interrupted).**" in said
    assert "> **INTERRUPTED.**" in said
    assert "> **FILTERED** (grid smoke; subjects scan)." in said
    assert "> **A BUG WAS PLANTED in fused: half_decay** (IT WAS NOT CAUGHT)." in said
    assert "a real video: `my.mp4`." in said


def test_nothing_ran(tmp_path):
    run = made(tmp_path, [])
    said = text(run)
    assert "**NOTHING OF OURS RAN.**" in said and "Nothing to draw" in said
    assert text(Run.open(run.folder)) == said


def test_only_the_first_failures_are_listed(tmp_path):
    many = [record("oom", case=f"B1-L{n}-float32", reason="out of memory") for n in range(1, 34)]
    said = text(made(tmp_path, many))
    assert "The first 30 of 33; records.jsonl has all." in said
    assert "\n30. **OOM**" in said and "\n31. " not in said
    assert "| forward | **33 FAILED** of 33 |" in said


@pytest.mark.parametrize("error", [0.0, math.inf, math.nan])
def test_errors_that_a_log_scale_cannot_hold(tmp_path, error):
    finding = Finding("y", "l2", error, 1e-7, 1.0)
    one = record("pass" if finding.passed else "fail", findings=(finding,))
    assert figures.error_against_length([one], tmp_path) == []


def test_other_subjects_and_lengths_unknown_are_not_drawn(tmp_path):
    assert figures.error_against_length([], tmp_path) == []
    assert figures.error_against_length([record(case="B1-E4-float32"), record(check="chunks")], tmp_path) == []
    assert not list(tmp_path.iterdir())
