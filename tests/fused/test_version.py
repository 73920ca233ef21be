"""`fused.__version__`: pyproject.toml states it, for a checkout and for an installation."""

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import fused

ROOT = Path(__file__).resolve().parents[2]


def test_it_is_the_projects() -> None:
    assert fused.__version__ == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


@pytest.mark.parametrize(("project", "wanted"), [("videomamba-bench", "9.8.7"), ("another", "1.2.3"), (None, "1.2.3")])
def test_a_checkout_comes_before_an_installation(tmp_path: Path, project: str | None, wanted: str) -> None:
    """The package beside a pyproject.toml, its own or another project's, and the metadata of an installed version."""
    shutil.copytree(ROOT / "fused", tmp_path / "fused", ignore=shutil.ignore_patterns("__pycache__"))
    if project is not None:
        (tmp_path / "pyproject.toml").write_text(f'[project]\nname = "{project}"\nversion = "9.8.7"\n')
    info = tmp_path / "videomamba_bench-1.2.3.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: videomamba-bench\nVersion: 1.2.3\n")
    script = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import fused; print(fused.__file__, fused.__version__)"
    output = subprocess.run([sys.executable, "-I", "-c", script], capture_output=True, text=True, check=True).stdout
    assert output.split() == [str(tmp_path / "fused" / "__init__.py"), wanted]
