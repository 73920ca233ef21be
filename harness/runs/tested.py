"""The versions of packages with which the whole test suite passed: an oldest and a newest stack, by `nox -s compat`."""

import importlib.metadata
import platform
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from packaging.version import Version

TABLE = Path(__file__).resolve().parents[1] / "tested_versions.toml"


def python_version() -> str:
    """Return Python's major and minor version, "3.11" for one."""
    return ".".join(platform.python_version_tuple()[:2])


class VersionRange(NamedTuple):
    """The oldest and the newest tested version of a package."""

    oldest: str
    newest: str

    def judge(self, version: str) -> str:
        """Return in words whether a version, "2.13.0+cpu" for one, is within the tested ones. Builds are not told apart."""
        here, oldest, newest = (Version(Version(v).public) for v in (version, *self))
        if here < oldest:
            return f"older than the oldest tested version, {self.oldest}"
        if here > newest:
            return f"newer than the newest tested version, {self.newest}; `nox -s tests` tests it"
        return f"within the tested versions, {self.oldest} to {self.newest}"


def read(path: Path = TABLE) -> dict[str, VersionRange]:
    """Return the tested versions of each package in the table, Python among them."""
    table = tomllib.loads(path.read_text())
    both = table["oldest"].keys() & table["newest"].keys()
    return {name: VersionRange(table["oldest"][name], table["newest"][name]) for name in sorted(both)}


def judge_installed(tested: Mapping[str, VersionRange]) -> dict[str, str]:
    """Return for each of these packages that is installed its version and `VersionRange.judge` of it, as one line."""
    found = {}
    for name, versions in tested.items():
        try:
            version = python_version() if name == "python" else importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        found[name] = f"{version}: {versions.judge(version)}"
    return found
