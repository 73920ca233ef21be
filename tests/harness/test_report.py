"""The page of a run: what must be loud is, the numbers stand where they belong, the figures exist."""

import math
import re

import pytest

from harness.judge import parity
from harness.judge.check import checks
from harness.records.finding import Finding
from harness.records.record import Record
from harness.report import deviation, error_growth, faults, margins
from harness.report import parity as page
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


def test_the_verdict_is_a_sentence_and_the_large_numbers_follow(run):
    said = text(run)
    lines = said.splitlines()
    assert lines[0] == f"# Parity on NVIDIA H200, grid full, {run.about['started'][:10]}"
    assert lines[2].startswith("1 of 4 answers of our implementations failed: 1 outside the budget (at most 3 budgets, ")
    assert "| 3 of 4 | 3 budgets | 0 of 1 | 3 |" in said
    where = "delta.grad (scan, check backward) by ours in plain PyTorch (fused:torch)"
    assert f"is the largest error of ours, 1 is the limit: {where}" in said
    assert "answers of other, a rival, passed; 1 crashed" in said and "3 | questions were" not in said
    assert said.index("](heat-map.svg)") < said.index("- [How tight](#how-tight)") < said.index("## How tight")
    good = [record(case=f"B1-L{n}-float32") for n in (5, 6)]
    assert text(made(run.folder / "good", good)).splitlines()[2] == (
        "All 2 answers of our implementations are as close to the reference as the tolerance demands; "
        "the tightest, y (scan, check forward), uses 25 % of its budget."
    )


def test_what_did_not_run_is_said(run):
    said = text(run)
    assert "- scan: **fused:mamba_ssm** (rival): mamba_ssm is not installed\n" in said
    assert "| 2 | scan | fused:torch | no \\| state |" in said
    assert not any(word in said.lower() for word in ("interrupted", "planted", "not finished", "gated", "licence"))


def test_sections_are_in_the_order_of_a_readers_questions_and_raw_answers_are_folded(run):
    said = text(run)
    heads = re.findall("^## (.*)", said, re.M)
    assert heads == [name for name, _ in re.findall(r"^- \[(.*)\]\(#(.*)\)", said, re.M)]
    assert [h for h in heads if h in ("How tight", "What failed", "What was not run", "The box", "How to repeat it")] == [
        "How tight", "What failed", "What was not run", "The box", "How to repeat it",
    ]  # fmt: skip
    folded = re.findall(r"<details><summary>(.*)</summary>", said)
    assert {"All answers, by subject", "The box", "Glossary", "Failures of rivals"} <= set(folded)
    assert "What failed" not in folded and "What was not run" not in folded


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


def test_failures_with_the_command_and_rivals_in_a_section_of_their_own(run):
    said = text(run)
    assert (
        f"""\
1. **outside the budget** (ours) backward, scan, fused:torch, B1-L63-E4-N2-bfloat16

   delta.grad, max: error 0.03, may be 0.01 (3 budgets), worst at (0, 62, 3); 2 of 3 findings fail

   ```
   {COMMAND}
   ```
"""
        in said
    )
    assert (
        """\
1. **crashed** (rival) forward, scan, other, B1-L63-E4-N2-float32

   reason: RuntimeError: two lines &lt;b>

   ```
   again other
   ```
"""
        in said
    )


def test_failures_are_told_by_kind(tmp_path):
    zero = [Finding("A.grad", norm, 1e-8, 0.0) for norm in ("l2", "max", "zero")]
    near = Finding("u.grad", "max", 1.01, 1.0, 50.0)
    bits, nan = (Finding("y", norm, 7.0, 0.0) for norm in ("bitwise", "nan"))
    many = [
        record("fail", "backward", "rival", f"B1-L{n}-float32", "rival", findings=tuple(bad))
        for n, bad in enumerate([zero, [near], [*zero, near], [bits], [nan]])
    ]
    many += [record("error", case="B9-float32", name="rival", role="rival", reason="NotImplementedError: no reverse")]
    kinds = [faults.of(r).kind for r in many]
    assert kinds == [faults.NOT_ZERO, faults.OUTSIDE, faults.OUTSIDE, faults.NOT_REPEATABLE, faults.OTHER, faults.REFUSED]
    assert faults.of(many[2]) == (faults.OUTSIDE, pytest.approx(1.01), pytest.approx(1.01 / 50))
    said = text(made(tmp_path, many))
    assert "| rival (rival) | 6 | 6 | 2 | 1 | 1 | 1 | 1 | 1.01 | 0.0202 |" in said and "| crashed |" not in said
    assert "\n\nNothing of ours.\n" in said
    assert "A.grad, l2: 1e-08 where exactly 0 is due" in said and "7 elements differ" in said and "inf budgets" not in said


def test_a_wrong_result_comes_before_bits_that_differ(tmp_path):
    """Bits that differ have no budget: they are neither the largest error in budgets nor the first thing to read."""
    bits = [record("fail", "batch", case=f"B{n}-float32", findings=(Finding("y", "bitwise", 7.0, 0.0),)) for n in range(40)]
    said = text(made(tmp_path, [*bits, record("fail", "backward", findings=(BAD, BAD_L2))]))
    assert "| 0 of 41 | 3 budgets | 0 |" in said
    failed = said[said.index("## What failed") :]
    assert "\n1. **outside the budget**" in failed and "\n2. **not repeatable**" in failed
    alone = text(made(tmp_path / "bits", bits[:1]))
    assert "| 0 of 1 | inf budgets | 0 |" in alone


def test_every_check_that_was_asked_is_explained_and_no_other(tmp_path):
    *asked, skipped = checks()
    said = text(made(tmp_path, [*(record(check=name) for name in asked), record("skip", skipped, reason="no")]))
    explained = dict(re.findall(r"^- `(\w+)`: (.*)$", said, re.M))
    assert list(explained) == asked and all(explained.values())
    assert explained["backward"] == "Do the gradients of every input, parameter and state agree with the reference in float64?"


def test_the_tightest_answers_name_the_element_and_the_command(run):
    said = text(run)
    row = next(line for line in said.splitlines() if line.startswith("| 3 | delta.grad (max) |"))
    assert "| (0, 62, 3) | backward | fused:torch | scan B1-L63-E4-N2-bfloat16 | 0.03 | 0.01 | 0.015 |" in row
    assert COMMAND in row
    table = said[said.index("## How tight") : said.index("## What failed")]
    ratios = [float(line.split(" | ")[0].strip("| ")) for line in table.splitlines() if re.match(r"[|] \d", line)]
    assert ratios == sorted(ratios, reverse=True) and len(ratios) <= 10


def test_cells_of_the_map_lead_to_their_worst_cases(run):
    text(run)
    svg, page_ = (run.folder / "heat-map.svg").read_text(), (run.folder / "report.html").read_text()
    links = set(re.findall(r'<a xlink:href="#([^"]*)"', svg))
    assert links == {"forward-fusedtorch", "backward-fusedtorch", "forward-other"}
    assert all(f'id="{link}"' in page_ for link in links) and all(f'href="#{link}"' in page_ for link in links)
    assert "2/2" in svg and "1/2" in svg and "0/1" in svg
    assert svg.count(f"fill: {margins.COLOURS[-1][1].lower()}") == 2  # what crashed has failed too, without a number


def test_video_and_box(run):
    said = text(run)
    assert "1 case used frames of a real video: the shipped clip, `bigbuckbunny.mp4`." in said
    assert "| git | f00d, WITH CHANGES |" in said and "| packages | torch 2.8.0, timm none |" in said
    where = "From a checkout of commit `f00d`, after `pip install -e .[harness]`:"
    assert f"## How to repeat it\n\n{where}\n\n```\npython -m harness parity\n```\n" in said


def test_every_finding_is_in_the_plot_of_margins(run):
    assert "](margins.svg)" in text(run)
    svg = (run.folder / "margins.svg").read_text()
    assert all(word in svg for word in (">backward<", ">forward<", "error in budgets", "ours in plain PyTorch"))
    assert "exact<" not in svg, "nothing is said of none"
    assert "The error of each of 6 findings in budgets" in (run.folder / "report.md").read_text()
    exact = [record(findings=(Finding("y", "bitwise", 0.0, 0.0),))]
    assert margins.margins(exact, run.folder) == [] and margins.tightest(exact) == "None."


def test_error_against_length_is_drawn(run):
    assert "](error-forward-float32.svg)" in text(run)
    svg = (run.folder / "error-backward-bfloat16.svg").read_text()
    assert "ours in plain PyTorch" in svg and "tokens" in svg
    assert "backward, bfloat16; in a ring: 1 failed" in (run.folder / "report.md").read_text()


def test_deviation_of_the_approximate_mode_is_drawn(tmp_path):
    near = [
        Finding(f"chunks of {chunk}, {ahead} ahead", "deviation", 0.3 / chunk, math.inf, 1.0)
        for chunk in (1, 2) for ahead in (0, 4)
    ]  # fmt: skip
    one = record(check="forward_approximate", findings=parity.selected_findings([GOOD, *near]))
    run = made(tmp_path / "run", [Record.parse(one.line())])
    assert "](approximate.svg)" in text(run)
    svg = (run.folder / "approximate.svg").read_text()
    assert all(word in svg for word in ("no look-ahead", "4 frames ahead", "frames of a chunk"))
    assert deviation.measured(run.records[0]) == {0: {1: 0.3, 2: 0.15}, 4: {1: 0.3, 2: 0.15}}
    assert deviation.approximate([record()], tmp_path) == []


def test_interrupted_filtered_and_planted_are_said(tmp_path):
    plan = {"grid": "smoke", "mutant": "half_decay", "subjects": ["scan"], "video": "my.mp4"}
    said = text(made(tmp_path, [record(case="B1-L7-video-float32")], "interrupted", plan=plan, filtered=True))
    assert "So far: the run is interrupted." in said.splitlines()[2]
    assert "> **Interrupted.**" in said
    assert "> **A part of the questions** (grid smoke; subjects scan). It speaks for these alone" in said
    assert "> **A bug was planted in fused: half_decay** (it was not caught)." in said
    assert "a real video: `my.mp4`." in said


def test_nothing_ran(tmp_path):
    run = made(tmp_path, [])
    said = text(run)
    assert "Nothing of ours was judged." in said and "No question was answered." in said
    assert text(Run.open(run.folder)) == said


def test_only_the_first_failures_are_listed(tmp_path):
    many = [record("oom", case=f"B1-L{n}-float32", reason="out of memory") for n in range(1, 34)]
    said = text(made(tmp_path, many))
    assert "The first 30 of 33; records.jsonl has all." in said
    assert "\n30. **out of memory**" in said and "\n31. " not in said
    assert "| forward | **33 FAILED** of 33 |" in said


@pytest.mark.parametrize("error", [0.0, math.inf, math.nan])
def test_errors_that_a_log_scale_cannot_hold(tmp_path, error):
    finding = Finding("y", "l2", error, 1e-7, 1.0)
    one = record("pass" if finding.passed else "fail", findings=(finding,))
    assert error_growth.against_length([one], tmp_path) == []


def test_other_subjects_and_lengths_unknown_are_not_drawn(tmp_path):
    assert error_growth.against_length([], tmp_path) == []
    assert error_growth.against_length([record(case="B1-E4-float32"), record(check="chunks")], tmp_path) == []
    assert not list(tmp_path.iterdir())
