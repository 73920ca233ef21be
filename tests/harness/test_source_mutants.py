"""Bugs planted in the sources of a small project: which tests count, what survives, what a run keeps and says."""

import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from harness.cli.app import app
from harness.cli.mutants import choose
from harness.runs import environment
from harness.runs.conclude import FAILED, NOTHING, PASSED
from harness.runs.store import Run
from harness.source_mutants import campaign, catalogue, fork_server
from harness.source_mutants.catalogue import NotPlanted, SourceMutant
from harness.source_mutants.tree import Tree

CODE = "def twice(x):\n    return 2 * x\n\n\ndef next_of(x):\n    return x + 1\n"
TESTS = """\
import os, subprocess, sys, time
import pytest
import numbers_of_mine as m

def test_twice(): assert m.twice(3) == 6
def test_slow():
    if m.twice(1) != 2: time.sleep(600)
def test_never(): assert False
def test_leaves_a_process():
    if m.twice(1) == 2: return
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)  # left behind"], start_new_session=True)
    time.sleep(600)
def test_dies():
    if m.twice(1) != 2: os.abort()
def test_signature(): assert os.environ["UNCHECKED_SIGNATURES"] or m.twice(1) == 2
def test_of_signatures(): assert not os.environ["UNCHECKED_SIGNATURES"] and m.twice(1) == 2
"""
BROKEN = "import numbers_of_mine, nothing_there\n\ndef test_broken(): pass\n"
WIDE = "import numbers_of_mine as m\n\ndef test_next(): assert m.next_of(1) == 2\n"


def bug(name: str, test: str, after: str = "return 3 * x", before: str = "return 2 * x", **more: str) -> dict:
    tests = [f"tests/test_narrow.py::{test}"] if test else []
    return {"file": "numbers_of_mine.py", "bug": name, "kind": "rule", "before": before, "after": after, "tests": tests} | more


BUGS = [
    bug("beside a broken file", "") | {"tests": ["tests/test_broken.py"]},
    bug("caught", "test_twice"), bug("hangs", "test_slow"), bug("always fails", "test_never"), bug("dies", "test_dies"),
    bug("caught by the room", "test_twice", "return x + 2", "return x + 1"), bug("no such test", "test_none"),
    bug("the same product", "test_twice", "return x * 2", equivalent="numbers commute"),
    bug("larger numbers", "test_twice", "return 2 * x + 0 * len(str(x))", survives="no test of the cost"),
    bug("seen by signatures", "test_signature"), bug("seen by tests of signatures", "test_of_signatures"),
    bug("unseen", "test_twice", "return 2 * x + 0"), bug("on a device", "", needs_gpu="it is about CUDA graphs"),
]  # fmt: skip
DUE = {
    "caught": "pass", "hangs": "pass", "always fails": "error", "dies": "pass", "caught by the room": "pass",
    "no such test": "error", "the same product": "skip", "larger numbers": "skip", "unseen": "fail", "on a device": "skip",
    "beside a broken file": "error", "seen by signatures": "pass", "seen by tests of signatures": "pass",
}  # fmt: skip


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with two files of tests, and its bugs, in place of this one."""
    root = tmp_path / "project"
    (root / "tests").mkdir(parents=True)
    (root / "numbers_of_mine.py").write_text(CODE)
    (root / "tests" / "test_narrow.py").write_text(TESTS)
    (root / "tests" / "test_wide.py").write_text(WIDE)
    (root / "tests" / "test_broken.py").write_text(BROKEN)
    (root / "data").mkdir()
    (root / "data" / "judge.jsonl").write_text("".join(json.dumps(b) + "\n" for b in BUGS))
    every = catalogue.read(root / "data")
    monkeypatch.setattr(catalogue, "read", lambda: every)
    monkeypatch.setattr(catalogue, "ROOMS", {"judge": ("tests/test_wide.py",)})
    monkeypatch.setattr(environment, "ROOT", root)
    monkeypatch.setattr(campaign, "NARROW", 8.0)
    monkeypatch.setattr(fork_server, "LIBRARIES", ())
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return root


def mutants(*words: str) -> Result:
    return CliRunner().invoke(app, ["mutants", "--jobs", "1", *words])


def processes(words: str) -> int:
    found = 0
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found += words.encode() in path.read_bytes()
        except OSError:
            continue
    return found


def test_every_verdict_and_the_page(project: Path, tmp_path: Path) -> None:
    done = mutants("--out", str(tmp_path / "run"))
    run = Run.open(tmp_path / "run")
    assert {r.case.partition(": ")[2]: r.status for r in run.records} == DUE, done.output
    assert done.exit_code == FAILED and "judge        75 %  6 of 8 caught" in done.output, done.output
    assert "SURVIVED numbers_of_mine.py: unseen: numbers_of_mine.py:2: 'return 2 * x' became 'return 2 * x + 0'" in done.output
    said = {r.case.partition(": ")[2]: r.reason or r.findings[0].note for r in run.records}
    assert said["always fails"] == "it fails without the bug too: tests/test_narrow.py::test_never"
    assert said["caught by the room"] == "tests/test_wide.py::test_next"
    assert said["hangs"] == "tests/test_narrow.py::test_slow did not end within 8 s"
    assert said["dies"] == "tests/test_narrow.py::test_dies died by signal 6"
    page = (tmp_path / "run" / "report.md").read_text()
    assert "| judge | 6 | 1 | 1 | 75 % | 1 | 1 | 3 |" in page and "numbers commute" in page and "no test of the cost" in page
    assert not list(tmp_path.glob("source-mutants-*")) and (project / "numbers_of_mine.py").read_text() == CODE


def test_a_run_goes_on_and_narrow_tests_can_be_all(project: Path, tmp_path: Path) -> None:
    words = ["--case", "*caught*", "--narrow", "--out", str(tmp_path / "run")]
    assert mutants(*words).exit_code == FAILED
    path = tmp_path / "run" / "records.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    assert [json.loads(line)["status"] for line in lines] == ["pass", "fail"]
    path.write_text(lines[0])
    assert mutants(*words, "--resume").exit_code == FAILED
    assert [json.loads(line)["case"] for line in path.read_text().splitlines()] == [json.loads(x)["case"] for x in lines]
    assert mutants("--case", "*: caught", "--out", str(tmp_path / "other")).exit_code == PASSED
    assert mutants("--case", "*none of these*").exit_code == NOTHING


def test_what_a_test_started_ends_with_it(project: Path, tmp_path: Path) -> None:
    with Tree(project) as tree, tree.planted([SourceMutant("judge", **bug("x", "test_leaves_a_process"))]):
        answer = tree.test(["tests/test_narrow.py::test_leaves_a_process"], 3.0)
        assert answer.code is None and processes("# left behind") == 0
    assert not list(tmp_path.glob("source-mutants-*"))


def test_files_of_one_size_planted_within_a_second_are_told_apart(project: Path) -> None:
    """Compiled files are known by size and second."""
    with Tree(project) as tree:
        for digit in "3456":
            with tree.planted([SourceMutant("judge", **bug(digit, "test_twice", f"return {digit} * x"))]):
                assert tree.test(["tests/test_narrow.py::test_twice"], 20.0).code == 1
            assert tree.test(["tests/test_narrow.py::test_twice"], 20.0).code == 0


def test_bugs_of_one_place_are_not_planted_together(project: Path) -> None:
    one, other = (SourceMutant("judge", **bug(digit, "test_twice", f"return {digit}")) for digit in "78")
    with Tree(project) as tree:
        with pytest.raises(NotPlanted, match="occurs 0 times"), tree.planted([one, other]):
            pass
        assert (tree.root / one.file).read_text() == CODE


def test_a_sample_is_drawn_by_the_commit(project: Path) -> None:
    every = [replace(mutant, killer="tests/test_narrow.py::test_twice") for mutant in catalogue.read()]
    assert choose(catalogue.read(), (), (), 3, "a") == [], "what no run has found is not drawn"
    drawn = [tuple(m.bug for m in choose(every, (), (), 3, commit)) for commit in ("a", "a", "b", "c", "d")]
    assert drawn[0] == drawn[1] and len(set(drawn)) > 2 and all(len(names) == 3 for names in drawn)
    assert choose(every, (), (), 99, "a") == choose(every, (), (), 0, "a") == every
    assert re.search(r"^13 bugs$", mutants("--dry-run").output, re.M)
    assert mutants("--room", "nowhere").exception is not None


def test_the_tests_that_found_bugs_are_noted_in_the_data(project: Path) -> None:
    name = "numbers_of_mine.py: "
    found = {name + "caught": "tests/test_narrow.py::test_twice[a-b]", name + "hangs": "the tests did not end within 8 s"}
    found[name + "dies"] = "tests/test_narrow.py::test_dies[a b] died by signal 6"
    before = catalogue.read_file(project / "data" / "judge.jsonl")
    catalogue.note_killers(found, project / "data")
    after = catalogue.read_file(project / "data" / "judge.jsonl")
    noted = {"caught": "tests/test_narrow.py::test_twice", "dies": "tests/test_narrow.py::test_dies"}
    assert after == [replace(m, killer=noted.get(m.bug, "")) for m in before]


def test_the_test_that_found_a_bug_goes_first_with_the_parameters_that_the_data_name() -> None:
    tests = ("a.py", "b.py::test_x[1]", "b.py::test_xy")
    mutant = SourceMutant("judge", **bug("x", "test_twice") | {"tests": tests})
    assert mutant.ordered_tests() == [*tests]
    assert replace(mutant, killer="b.py::test_x").ordered_tests() == ["b.py::test_x[1]", "a.py", "b.py::test_xy"]
    assert replace(mutant, killer="a.py::test_z").ordered_tests() == ["a.py::test_z", *tests]


def test_a_tree_begins_with_the_emulated_kernels_of_the_last_day(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "mine"))
    folder = tmp_path / "mine" / "videomamba-bench" / "emulated"
    folder.mkdir(parents=True)
    for name in ("new.so", "old.so", "draft"):
        (folder / name).write_text(name)
    os.utime(folder / "old.so", (0, 0))
    with Tree(project) as tree:
        copies = tree.root.parent / "cache" / "videomamba-bench" / "emulated"
        assert [path.name for path in copies.iterdir()] == ["new.so"] and not (copies / "new.so").is_symlink()
