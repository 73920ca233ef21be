"""The table of tested versions: written by `nox -s compat`, read by `doctor`, and the floors of pyproject.toml are in it."""

import tomllib

import compat
import pytest
from packaging.version import Version

from harness.cli import inspect
from harness.runs import environment, tested
from harness.runs.tested import VersionRange


def test_floors_are_tested_versions():
    """The floors of pyproject.toml are the oldest versions that were tested."""
    table, floors = tomllib.loads(tested.TABLE.read_text()), compat.floors()
    assert {"torch", "numpy", "av", "typer", "onnx", "transformers", "cuda-bindings"} <= set(floors)
    assert {name: Version(table["oldest"][name]) for name in floors} == {n: Version(v) for n, v in floors.items()}
    assert set(table["oldest"]) == set(table["newest"]) == {*floors, "python", "triton"}
    assert all(Version(table["oldest"][name]) <= Version(table["newest"][name]) for name in table["oldest"])


@pytest.mark.parametrize(
    ("version", "words"),
    [
        ("2.8.0", "within the tested versions, 2.8.0 to 2.15.0"),
        ("2.8.0+cu128", "within"),
        ("2.13.1", "within"),
        ("2.15.0+cpu", "within"),
        ("2.15.1", "newer than the newest tested version, 2.15.0"),
        ("2.100.0", "newer"),
        ("2.7.9", "older than the oldest tested version, 2.8.0"),
        ("2.8.0.dev20250601", "older"),
        ("2.8.0rc1", "older"),
    ],
)
def test_a_version_is_judged(version, words):
    assert VersionRange("2.8.0", "2.15.0").judge(version).startswith(words)


def test_what_is_not_installed_is_left_out():
    ranges = {"no-such-package": ("1", "2"), "pytest": ("1", "2"), "python": ("3.11", "9")}
    found = tested.judge_installed({name: VersionRange(*versions) for name, versions in ranges.items()})
    assert list(found) == ["pytest", "python"] and "newer than the newest" in found["pytest"] and "within" in found["python"]


def test_a_stack_is_entered_beside_the_other():
    first = compat.enter("newest", {"python": "3.12.1", "torch": "2.15.0"}, {})
    second = compat.enter("oldest", {"python": "3.11.7", "torch": "2.8.0"}, tomllib.loads(first))
    third = compat.enter("newest", {"python": "3.13.0", "torch": "2.16.0"}, tomllib.loads(second))
    assert tomllib.loads(third) == {
        "oldest": {"python": "3.11.7", "torch": "2.8.0"},
        "newest": {"python": "3.13.0", "torch": "2.16.0"},
    }


def test_doctor_says_it(capsys, monkeypatch):
    monkeypatch.setattr(environment, "prepare", lambda: None)
    monkeypatch.setattr(tested, "read", lambda: {"torch": VersionRange("1.0", "2.0"), "numpy": VersionRange("1.0", "99")})
    inspect.doctor()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("tested ")]
    assert len(lines) == 2 and "torch 2." in lines[0] and "newer than the newest tested version, 2.0" in lines[0]
    assert "numpy" in lines[1] and lines[1].endswith("within the tested versions, 1.0 to 99")
