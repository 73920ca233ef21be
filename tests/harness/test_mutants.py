"""Every planted bug makes `parity` exit 1, in float32 and in bfloat16; the same questions without it exit 0.

Those that only a training shows are in test_convergence.py, where truth and plain are trained once for all of them.
"""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from harness.cli import app
from harness.store import Run
from harness.subject import mutants

OURS = ("--impl", "fused:torch")
NARROW = {"forget_last_token": OURS, "restart_backward": OURS, "cut_gradients_at_chunks": OURS}
ROOT = Path(__file__).parents[2]
QUICK = [m for m in sorted(mutants()) if "convergence" not in importlib.import_module(f"harness.mutants.{m}").WHERE]


def parity(out: Path, *options: str) -> int:
    words = ["parity", "--grid", "smoke", "--device", "cpu", "--out", str(out), *options]
    if "compile" in options:  # what checks signatures here cannot be traced
        return subprocess.run([sys.executable, "-m", "harness", *words], cwd=ROOT, capture_output=True).returncode
    return CliRunner().invoke(app, words).exit_code


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mutant", QUICK)
def test_planted_bug_is_caught(mutant: str, dtype: str, tmp_path: Path) -> None:
    where = (*importlib.import_module(f"harness.mutants.{mutant}").WHERE, *NARROW.get(mutant, ()), "--dtype", dtype)
    quick = () if "--check" in where else ("--check", "forward", "--check", "backward")
    jobs = ("--jobs", "2" if (mutant, dtype) == ("drop_skip", "float32") else "1")
    assert parity(tmp_path / "honest", *where, *quick, "--jobs", "1") == 0
    assert parity(tmp_path / "planted", *where, *quick, *jobs, "--mutant", mutant) == 1
    records = Run.open(tmp_path / "planted").records
    assert any(r.status == "fail" and r.role == "ours" for r in records)
    assert not any(r.status == "error" for r in records)
    assert mutant in (tmp_path / "planted" / "report.md").read_text()
