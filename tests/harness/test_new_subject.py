"""An operator of one file and its subject of one file are listed, judged and timed without an edit of any other file."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import harness.subjects
from harness.bench import grids, roofline
from harness.cli.app import app
from harness.records.ceilings import Ceilings
from harness.records.speed import Point
from harness.runs.conclude import FAILED, PASSED
from harness.runs.store import Run

BEST = Ceilings(copy=1e12, matmul=1e14, exp=1e12)

OPERATOR = '''
"""A running sum of gated tokens."""

import torch


def by_loop(x, z):
    total, sums = torch.zeros_like(x[:, 0]), []
    for t in range(x.shape[1]):
        total = total + x[:, t]
        sums.append(total * torch.sigmoid(z[:, t]))
    return torch.stack(sums, 1)


def by_cumsum(x, z):
    return x.cumsum(1) * torch.sigmoid(z)
'''

SUBJECT = '''
"""A running sum, gated."""

import torch
import toy_operator

from harness.judge import race
from harness.judge.case import LOW_PRECISIONS, cross
from harness.judge.implementation import Implementation
from harness.judge.race import Race
from harness.records.ceilings import element_bytes


def cases(grid):
    return cross("toy", [{"B": 2, "L": 7, "E": 10}, {"B": 2, "L": 197, "E": 384}], [()], LOW_PRECISIONS[:2])


def implementations():
    fast = Implementation("fused:cumsum", lambda x, z: toy_operator.by_cumsum(x, z))
    return [Implementation("reference", toy_operator.by_loop), fast]


def draw(case, seed):
    return {name: case.normal(seed, name, case["B"], case["L"], case["E"]) for name in ("x", "z")}


def precise(case):
    return set()


def evaluate(call, case, leaves):
    accumulated = {k: v.to(torch.promote_types(v.dtype, torch.float32)) for k, v in leaves.items()}
    return {"y": call(**accumulated).to(leaves["x"].dtype)}


def no_cotangent(case):
    return set()


def output_values(case):
    return case["B"] * case["L"] * case["E"]


def steps(case):
    return case["L"]


def per_clip(case):
    return {"x", "z"}


def costly_checks(case):
    return {"writes"}


def races():
    sizes = lambda B, E, L: {"B": B, "L": L, "E": E}
    points = lambda grid: race.operator_points("toy-race", grid, sizes)
    words = lambda n: f"toy, {race.rows(n)}"
    return [Race("toy-race", points=points, contenders=(("toy", ""),), title="the toy", words=words)]


def licence(dtype):
    return (f"B2-L197-E384-{dtype}",)
'''

BOUND = '''

def bound(point, variant, ceilings):
    return 3 * point.tokens * point["E"] * element_bytes(point.dtype) / ceilings.copy
'''


@pytest.fixture
def add(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator:
    """Write both files, in a folder beside the package's own."""
    monkeypatch.syspath_prepend(str(tmp_path / "operators"))
    monkeypatch.setattr(harness.subjects, "__path__", [*harness.subjects.__path__, str(tmp_path / "subjects")])

    def write(subject: str) -> None:
        for folder, name, text in (("operators", "toy_operator", OPERATOR), ("subjects", "toy", subject)):
            (tmp_path / folder).mkdir()
            (tmp_path / folder / f"{name}.py").write_text(text)

    yield write
    for name in ("toy_operator", "harness.subjects.toy"):
        sys.modules.pop(name, None)
    if hasattr(harness.subjects, "toy"):
        del harness.subjects.toy


def run(*words: str) -> Result:
    return CliRunner().invoke(app, list(words))


def parity(out: Path) -> Result:
    """The questions that need no second process, which would not know the folder of this test."""
    checks = [word for check in ("forward", "backward", "batch", "writes") for word in ("--check", check)]
    return run("parity", "--grid", "smoke", "--device", "cpu", "--jobs", "1", "--subject", "toy", *checks, "--out", str(out))


def test_it_is_listed_judged_and_timed(add, tmp_path: Path) -> None:
    add(SUBJECT + BOUND)
    listed = run("list").output
    assert "toy         A running sum, gated." in listed and "fused:cumsum" in listed
    done = parity(tmp_path / "honest")
    assert done.exit_code == PASSED, done.output
    asked = {(r.implementation, r.check) for r in Run.open(tmp_path / "honest").records if r.status == "pass"}
    assert asked == {("fused:cumsum", check) for check in ("forward", "backward", "batch", "writes")}
    planned = run("bench", "--grid", "cpu", "--device", "cpu", "--race", "toy-race", "--dry-run")
    assert planned.exit_code == 0 and "toy-race-B1-L197-E384-infer-eager-float32" in planned.output, planned.output
    assert planned.output.count("toy fused:cumsum") == 4
    point = Point("toy-race", (("B", 1), ("L", 10), ("E", 4)), "infer", dtype="float32")
    assert roofline.bound(point, "toy", "", BEST) == pytest.approx(3 * 40 * 4 / 1e12)


def test_a_planted_bug_is_found(add, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add(SUBJECT + BOUND)
    import toy_operator

    monkeypatch.setattr(toy_operator, "by_cumsum", lambda x, z: x.cumsum(1) * z.sigmoid() * (1 + 1e-2 * (x > 2)))
    done = parity(tmp_path / "planted")
    assert done.exit_code == FAILED and "FAIL (ours) forward toy fused:cumsum" in done.output, done.output


def test_without_a_bound_it_is_not_timed(add) -> None:
    """No other subject's bound stands in, neither for the roofline nor for a benchmark run, nor its plan."""
    add(SUBJECT)
    point = Point("toy-race", (("B", 1), ("L", 10), ("E", 4)), "infer", dtype="float32")
    with pytest.raises(roofline.NoBound, match="subject 'toy' has no bound"):
        roofline.bound(point, "toy", "", BEST)
    with pytest.raises(roofline.NoBound, match="subject 'toy' has no bound"):
        grids.entries("toy-race", "cpu", "sdpa")
    error = run("bench", "--grid", "cpu", "--device", "cpu", "--race", "toy-race", "--dry-run").exception
    assert isinstance(error, roofline.NoBound)


def test_what_is_missing_is_named(add) -> None:
    add(SUBJECT.replace("def steps(", "def other("))
    assert "subject 'toy' lacks steps" in str(run("list").exception)
