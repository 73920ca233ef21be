"""Two runs on one page: what each says, how they differ, and the verdict."""

import dataclasses
from pathlib import Path

import pytest
import sweeps
import test_report
from typer.testing import CliRunner

from harness.cli.app import app
from harness.records.finding import Finding
from harness.report import side_by_side
from harness.runs.store import Run, StoreError


def test_two_benches(tmp_path: Path) -> None:
    conv = [s for s in sweeps.operators() if s.point.race == "conv"]
    slower = [dataclasses.replace(s, seconds=tuple(2 * t for t in s.seconds)) if s.point["L"] == 197 else s for s in conv]
    base, new = sweeps.made(tmp_path / "base", conv), sweeps.made(tmp_path / "new", [*slower[:-1]])
    text = side_by_side.write(base, new, tmp_path / "both").read_text()
    said = "Of 24 points of ours 0 are faster, 20 take the same time, within 2 %, 4 are slower, 0 vary too much to tell."
    assert text.splitlines()[:3:2] == ["# new beside base", said]
    assert "| conv-B64-L197-E1152-K4-infer-eager-bfloat16 | conv fused:native | 2.000 |" in text
    assert "only in" in text and "](sides.svg)" in text and "python -m harness report" in text
    assert text.count("as fast as upstream") == 2  # what each run says of itself


def test_two_parity_runs_by_the_command(tmp_path: Path) -> None:
    good, worse = (Finding("y", "l2", error, 1.0) for error in (0.25, 3.0))
    cases = [f"B1-L{n}-float32" for n in (1, 2, 3)]
    before = [test_report.record(case=case, findings=(good,)) for case in cases]
    tighter = dataclasses.replace(good, error=0.75)
    after = [
        test_report.record("fail", case=cases[0], findings=(worse,), command="again"),
        test_report.record(case=cases[1], findings=(tighter,)),
        test_report.record("error", case="B9-float32", name="other", role="rival", reason="why"),
    ]
    test_report.made(tmp_path / "base", before)
    test_report.made(tmp_path / "new", after)
    out = tmp_path / "both"
    done = CliRunner().invoke(app, ["report", str(tmp_path / "base"), str(tmp_path / "new"), "--out", str(out)])
    assert done.exit_code == 0 and done.output.strip() == str(out / "report.md"), done.output
    text = (out / "report.md").read_text()
    assert "1 answer of ours fails now that did not before. 2 of 2 common answers have another error." in text
    assert "](sides.svg)" in text and "| 1 | 1 of 2 | 1 |" in text
    assert "| scan | fused:torch | forward | B1-L1-float32 | pass | fail |" in text
    assert "| scan | fused:torch | forward | B1-L2-float32 | 0.25 | 0.75 |" in text
    assert Run.open(tmp_path / "new").counts()["failed"] == 1  # the runs stay as they were


def test_what_came_right_and_what_a_rival_lost_is_no_loss_of_ours(tmp_path: Path) -> None:
    found = {"pass": (Finding("y", "l2", 0.25, 1.0),), "fail": (Finding("y", "l2", 3.0, 1.0),)}

    def made(name: str, ours: str, rival: str, *others: int) -> Run:
        records = [
            test_report.record(ours, case="B1-float32", findings=found[ours]),
            test_report.record(rival, case="B1-float32", name="theirs", role="rival", findings=found[rival]),
            *(test_report.record(case=f"B{n}-float32", findings=found["pass"]) for n in others),
        ]
        return test_report.made(tmp_path / name, records)

    base, new = made("base", "fail", "pass", 2, 3, 4), made("new", "pass", "fail", 9)
    text = side_by_side.write(base, new, tmp_path / "both").read_text()
    assert "No answers of ours fail now that did not before." in text and "| 0 | 2 of 2 | 1 |" in text
    assert "questions are new; 3 are gone" in text


def test_runs_of_two_kinds_have_no_comparison(tmp_path: Path) -> None:
    base, new = sweeps.made(tmp_path / "a", []), test_report.made(tmp_path / "b", [])
    with pytest.raises(StoreError, match="runs of bench and parity have no comparison"):
        side_by_side.write(base, new, tmp_path / "both")
    assert not (tmp_path / "both").exists()


def test_the_largest_changes_of_errors_come_first_better_or_worse(tmp_path: Path) -> None:
    def made(name: str, *errors: float) -> Run:
        found = [(f"B1-L{n}-float32", Finding("y", "l2", error, 1.0)) for n, error in enumerate(errors)]
        return test_report.made(tmp_path / name, [test_report.record(case=case, findings=(f,)) for case, f in found])

    text = side_by_side.write(made("base", 0.9, 0.5, 0.1), made("new", 0.1, 0.6, 0.4), tmp_path / "both").read_text()
    lines = text.partition("## Largest changes")[2].splitlines()
    assert [line.split(" | ")[-2:] for line in lines if line.startswith("| scan")] == [
        ["0.9", "0.1 |"], ["0.1", "0.4 |"], ["0.5", "0.6 |"],
    ]  # fmt: skip
    assert "No answers of ours fail now that did not before. 3 of 3 common answers have another error." in text
