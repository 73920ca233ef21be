"""The planted bugs as data: each still has its place in the sources, and tests that are there."""

import ast
import json
from collections import Counter
from pathlib import Path

import pytest

from harness.source_mutants import catalogue
from harness.source_mutants.catalogue import KINDS, ROOMS, SourceMutant

ROOT = Path(__file__).resolve().parents[2]
EVERY = catalogue.read()


def around(mutant: SourceMutant, text: str) -> str:
    """Return the functions or classes that a bug is in, which two empty lines part: parsing whole files takes seconds."""
    begin = text.index(mutant.before)
    first, last = text.rfind("\n\n\n", 0, begin), text.find("\n\n\n", begin + len(mutant.before))
    return mutant.planted(text[first + 1 : last if last >= 0 else None])


def is_python(text: str) -> bool:
    try:
        ast.parse(text)
    except SyntaxError:
        return False
    return True


def wrong(mutant: SourceMutant) -> str:
    """Return what is wrong with a bug; empty if nothing is."""
    text = (ROOT / mutant.file).read_text()
    if text.count(mutant.before) != 1:
        return f"`before` occurs {text.count(mutant.before)} times"
    if mutant.after == mutant.before or mutant.kind not in KINDS or mutant.room not in ROOMS:
        return "it changes nothing, or its kind or room is unknown"
    if mutant.file.endswith(".py") and not (is_python(around(mutant, text)) or is_python(mutant.planted(text))):
        return "what is planted is no Python"
    if not (mutant.tests or mutant.equivalent or mutant.needs_gpu):
        return "no test is asked"
    for test in filter(None, (*mutant.tests, mutant.killer)):
        path, _, function = test.partition("::")
        if not (ROOT / path).exists() or f"def {function.partition('[')[0]}" not in (ROOT / path).read_text():
            return f"there is no test {test}"
    return ""


def test_every_bug_has_its_place() -> None:
    assert not [f"{mutant.name}: {said}" for mutant in EVERY if (said := wrong(mutant))]


def test_names_are_unique_and_every_room_has_bugs() -> None:
    assert [name for name, count in Counter(m.name for m in EVERY).items() if count > 1] == []
    assert {m.room for m in EVERY} == set(ROOMS)


def test_the_readme_says_how_many_are_found() -> None:
    """Of each room, of those that a CPU can show: those whose killer a run has noted."""
    readme = " ".join((ROOT / "README.md").read_text().split())
    for room in ROOMS:
        asked = [m for m in EVERY if m.room == room and not m.equivalent and not m.needs_gpu]
        assert f"{room} {sum(bool(m.killer) for m in asked)} of {len(asked)}" in readme, room


@pytest.mark.parametrize("line", ["{", "[]", '{"file": "a.py"}', '{"no": "field"}'])
def test_a_wrong_entry_is_named(line: str, tmp_path: Path) -> None:
    good = {"file": "a.py", "bug": "b", "kind": "rule", "before": "x", "after": "y"}
    (tmp_path / "judge.jsonl").write_text(json.dumps(good) + "\n" + line + "\n")
    with pytest.raises(ValueError, match="judge.jsonl, line 2 is no planted bug"):
        catalogue.read(tmp_path)
