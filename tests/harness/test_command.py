"""The command line before any work: what is missing, what cannot be written, what is asked for wrongly, and what is left out."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("missing", ["typer", "rich", "matplotlib", "markdown_it", "pytest_benchmark"])
def test_without_its_extra_the_command_says_which(missing: str, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(f"import sys\nsys.modules[{missing!r}] = None\n")  # as if it were not there
    done = subprocess.run(
        [sys.executable, "-m", "harness", "list"], cwd=ROOT, env={"PYTHONPATH": f"{tmp_path}:{ROOT}"}, capture_output=True, text=True
    )
    assert done.returncode == 4 and done.stdout == ""
    assert done.stderr == (
        f"error: python -m harness needs {missing}, which is not installed: pip install 'videomamba-bench[harness]'\n"
    )
