"""Enters the versions that are installed here into harness/tested_versions.toml, after the tests passed: `nox -s compat`.

    python tests/compat.py oldest
"""

import importlib.metadata
import platform
import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "harness/tested_versions.toml"
HEAD = "# Written by `nox -s compat`: versions with which all tests passed. `python -m harness doctor` reads it.\n"
STACKS = ("oldest", "newest")
EXTRAS = ("harness", "native", "hub", "train", "teachers", "onnx")  # what `nox -s compat` installs


def floors() -> dict[str, str]:
    """Return the oldest version that pyproject.toml allows of each package of the base and of EXTRAS."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    requirements = [*project["dependencies"], *(requirement for extra in EXTRAS for requirement in extras[extra])]
    return dict(re.match(r"([\w-]+)>=([\d.]+)", requirement).groups() for requirement in requirements)


def enter(stack: str, versions: dict[str, str], table: dict[str, dict[str, str]]) -> str:
    """Return the text of the table with these versions for a stack."""
    table = {**table, stack: versions}
    parts = [
        "\n".join([f"[{name}]", *(f'{package} = "{version}"' for package, version in table[name].items())])
        for name in STACKS if name in table
    ]  # fmt: skip
    return HEAD + "\n" + "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    [stack] = sys.argv[1:]
    assert stack in STACKS, f"the stack is one of {', '.join(STACKS)}, got {stack}"
    packages = {name: importlib.metadata.version(name) for name in sorted({*floors(), "triton"})}
    known = tomllib.loads(TABLE.read_text()) if TABLE.exists() else {}
    TABLE.write_text(enter(stack, {"python": ".".join(platform.python_version_tuple()[:2]), **packages}, known))
