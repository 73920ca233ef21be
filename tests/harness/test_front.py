"""The front page: newest numbers, the trend, and which accepted runs are of older code."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import sweeps
import test_report
from typer.testing import CliRunner

from harness.bench import grids
from harness.cli.app import app
from harness.judge.request import UsageError
from harness.records.speed import Entry
from harness.report import accepted, front
from harness.runs import acceptance, environment, freshness
from harness.runs.store import Run


def git(folder: Path, *words: str) -> str:
    name = ("-c", "user.name=a", "-c", "user.email=a@example.org")
    return subprocess.run(["git", *name, *words], cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with one commit."""
    pages = "harness/report/parity.py", "harness/source_mutants/a.jsonl", "reference/README.md"
    for path in ("fused/ops/a.py", "fused/ops/b.py", *pages):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("1\n")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-qm", "one")
    monkeypatch.setattr(freshness, "ROOT", tmp_path)
    return tmp_path


def run_of(commit: str) -> Run:
    run = Run(Path("nowhere"))
    run.about = {"commit": commit}
    return run


def test_a_run_is_older_by_the_sources_that_changed_and_by_no_page(checkout: Path) -> None:
    run = run_of(git(checkout, "rev-parse", "HEAD"))
    assert freshness.changed_since(run) == () and freshness.in_words(()) == "of this code"
    for path in ("harness/report/parity.py", "harness/source_mutants/a.jsonl", "reference/README.md"):
        (checkout / path).write_text("2\n")
    assert freshness.changed_since(run) == ()
    for path in ("fused/ops/a.py", "fused/ops/b.py"):
        (checkout / path).write_text("2\n")
    git(checkout, "commit", "-qam", "two")
    assert (changed := freshness.changed_since(run)) == ("fused/ops/a.py", "fused/ops/b.py")
    assert freshness.in_words(changed) == "older: 2 files changed since, fused/ops (2)"
    assert freshness.changed_since(run_of("0" * 40)) is None and freshness.changed_since(run_of("")) is None
    assert freshness.in_words(None) == "unknown: its commit is not in this checkout"


def test_the_front_page(checkout: Path) -> None:
    folder = checkout / "reports"
    here = folder / "accepted" / "h200"
    tiny = [s for s in sweeps.models() if s.point.race == "tiny" and s.point.mode == "infer"]
    commit = git(checkout, "rev-parse", "HEAD")
    sweeps.made(here / "20300101-bench", tiny, started="2030-01-01", commit=commit).save()
    sweeps.made(here / "20300201-bench", tiny, started="2030-02-01", commit="0" * 40).save()
    test_report.made(here / "20290101-parity", [test_report.record()], commit=commit)
    text = front.write(folder).read_text()
    said = re.sub("<[^>]*>", "", text)
    assert "VideoMamba-Ti is 4.0 to 10 times as fast as upstream in inference" in said
    assert "<h1>Mamba video models: what was measured on NVIDIA H200</h1>" in text
    assert "the one answer within the tolerance, the tightest at 25 % of its budget." in said
    assert "No accepted run asks about bimba, " in said and "| scan" not in said and "1 of 1" in said
    assert 'href="accepted/h200/20300201-bench/report.html"' not in text  # there is no such page yet
    shutil.copy(folder / "index.html", here / "20300201-bench" / "report.html")
    text = front.write(folder).read_text()
    assert 'href="accepted/h200/20300201-bench/report.html"' in text
    assert said.index("20300201-bench") < said.index("20300101-bench")
    assert "of this code" in said and "unknown: its commit is not in this checkout" in said
    assert re.search(r"\b1 ?of 3 ?accepted runs are of older code", " ".join(said.split()))  # the one of unknown age
    assert "2030-02-01" in (folder / "trend.svg").read_text() and not re.search(r"https?://(?!www.w3.org)", text)


def test_answers_are_those_of_the_newest_run_that_asked(checkout: Path) -> None:
    """Each subject and implementation by itself: an older run that asked more of one still stands for the other."""
    here = checkout / "reports" / "accepted" / "h200"
    bad = {"2027-01-01": test_report.record("error", reason="why"), "2028-01-01": test_report.record("error", reason="why")}
    for day in ("2028-01-01", "2029-01-01", "2027-01-01"):
        records = [bad.get(day, test_report.record())] + [test_report.record(name="reference")] * (day == "2028-01-01")
        run = test_report.made(here / f"{day}-parity", records)
        run.about["started"] = day
        run.save()
    said = re.sub("<[^>]*>", " ", front.write(checkout / "reports").read_text())
    row = re.search(r"scan\s+(\d of \d)\s+(\d of \d)", said.partition("How right")[2])
    assert row and row.groups() == ("1 of 1", "1 of 1")


def test_one_bench_has_no_trend(tmp_path: Path) -> None:
    one = sweeps.made(tmp_path / "a", [s for s in sweeps.operators() if s.point.race == "conv"])
    assert front.trend({tmp_path / "a": one}, tmp_path) == [] and not (tmp_path / "trend.svg").exists()


def test_the_committed_front_page_names_every_accepted_run() -> None:
    reports = environment.ROOT / "reports"
    text = (reports / "index.html").read_text()
    links = {(reports / link).parent for link in re.findall(r'href="(accepted/[^"]*)"', text)}
    assert links == {path.parent for path in reports.glob("accepted/*/*/run.json")}


def test_every_race_and_family_has_its_newest_numbers(checkout: Path) -> None:
    """Those of other families, streams and chunks have tables of their own; a run at a part of the points may stand in."""
    here = checkout / "reports" / "accepted" / "h200"
    at = [p for p in grids.points("full") if p.race == "bimba" and p.mode == "infer"][:1]
    ours, pooling = Entry("bimba", "fused:native", "ours"), Entry("resamplers", "pooling", "rival")
    bimba = [sweeps.speed(entry, p, ms, 2.5) for p in at for entry, ms in ((ours, 10.0), (pooling, 1.0))]
    sweeps.made(here / "20300101-bimba", bimba, started="2030-01-01", plan={"points": ["*"]}).save()
    sweeps.made(here / "20300102-stream", sweeps.pieces(), started="2030-01-02").save()
    text = front.write(checkout / "reports").read_text()
    said = re.sub("<[^>]*>", "", text)
    heads = re.findall("<h3[^>]*>([^<]*)</h3>", text)
    assert heads == ["BIMBA's compressor", "A causal model, frame by frame", "A bidirectional model, in chunks"]
    assert "64 frames of 24 x 24 tokens to 2,304, width 1,024, inference" in said and "1 (0.10x)" in said and "2.5" in said
    readme = checkout / "reports" / "README.md"
    readme.write_text("\n".join(accepted.MARKERS))
    accepted.refresh(readme, here)
    block = readme.read_text()
    assert said.count("bench, a part") == 1, "the list of accepted runs says which asked a part"
    assert "bimba (a part): on one NVIDIA H200" in block and "stream, chunks: on one" in block
    assert "### BIMBA's compressor\n\nFrom [20300101-bimba](accepted/h200/20300101-bimba/report.md):" in block
    sweeps.made(here / "20290101-whole", bimba, started="2029-01-01").save()
    accepted.refresh(readme, here)
    assert "20300101-bimba" not in readme.read_text(), "a whole run goes before a newer part"


def test_the_pages_of_all_accepted_runs_by_the_command(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(acceptance, "ACCEPTED", checkout / "reports" / "accepted")
    here = checkout / "reports" / "accepted" / "h200" / "20300101-bench"
    conv = [s for s in sweeps.operators() if s.point.race == "conv"]
    sweeps.made(here, conv, started="2030-01-01").save()
    (checkout / "reports" / "README.md").write_text("\n".join(accepted.MARKERS))
    (here / "older.svg").write_text("a figure of an earlier version")
    done = CliRunner().invoke(app, ["report", "--accepted"])
    assert done.exit_code == 0, (done.output, done.exception)
    assert done.output.split() == [str(here / "report.md"), str(checkout / "reports" / "index.html")]
    assert (here / "report.html").exists() and not (here / "older.svg").exists()
    assert "| convolution, 8 x 1,569 tokens" in (checkout / "reports" / "README.md").read_text()
    refused = CliRunner().invoke(app, ["report", str(here), "--accepted"])
    assert isinstance(refused.exception, UsageError) and "takes no folder" in str(refused.exception)
