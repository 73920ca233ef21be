"""Every planted bug makes `parity` exit 1 by the check and tensor that it names, in float32 and in bfloat16; the same questions
without it exit 0.

Those that only a training shows are in test_convergence.py, where truth and plain are trained once for all of them.
"""

import functools
from fnmatch import filter as matching
from pathlib import Path

import pytest
import torch
from packaging.version import Version
from typer.testing import CliRunner

from harness.cli.app import app
from harness.judge import parity
from harness.judge.registry import mutants
from harness.runs.store import Run

OURS = ("--impl", "fused:torch")
NARROW = {
    "forget_last_token": OURS, "restart_backward": OURS, "cut_gradients_at_chunks": OURS,
    # with checked signatures Dynamo cannot trace the functions that fused:cpu imports where it calls them
    "keep_packed_weights": OURS, "keep_random_mask": OURS,
}  # fmt: skip
DTYPES = ("float32", "bfloat16")
QUICK = [name for name, bug in mutants().items() if "convergence" not in bug.FAILS]


def asked(out: Path, *options: str) -> int:
    words = ["parity", "--grid", "smoke", "--device", "cpu", "--jobs", "1", "--out", str(out), *options]
    return CliRunner().invoke(app, words).exit_code


@functools.cache
def honest(folder: Path, *options: str) -> int:
    """Several bugs are asked the same."""
    return asked(folder / str(honest.cache_info().misses), *options)


@pytest.mark.usefixtures("answered_once", "undrawn", "unchecked")  # what checks signatures cannot be compiled
@pytest.mark.filterwarnings("ignore:Dynamo detected")
@pytest.mark.parametrize("mutant", QUICK)
def test_planted_bug_is_caught(
    mutant: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parity, "MAX_SEARCHES", 0)  # which length fails first is asked by test_locate.py
    if mutant == "omit_bias_when_compiled" and Version(torch.__version__) < Version("2.11"):
        pytest.skip("Dynamo of PyTorch before 2.11 cannot trace functions whose signatures these tests check")
    bug = mutants()[mutant]
    where = (*bug.WHERE, *NARROW.get(mutant, ()))
    where += tuple(word for dtype in DTYPES for word in ("--dtype", dtype))
    quick = () if "--check" in where else ("--check", "forward", "--check", "backward")
    assert honest(tmp_path_factory.getbasetemp() / "honest", *where, *quick) == 0
    assert asked(tmp_path / "planted", *where, *quick, "--mutant", mutant) == 1
    records = Run.open(tmp_path / "planted").records
    check, tensor = bug.FAILS
    for dtype in DTYPES:
        mine = [r for r in records if (r.role, r.check, r.dtype) == ("ours", check, dtype)]
        outside = {f.tensor for r in mine for f in r.findings if not f.passed}
        assert matching(outside, tensor), (dtype, outside)
    assert not any(r.status == "error" for r in records)
    assert mutant in (tmp_path / "planted" / "report.md").read_text()
