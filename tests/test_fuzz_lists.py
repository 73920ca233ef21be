"""Lists, configurations and records that are damaged or hostile: an error that names the file, or what they say."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fuzzing import examples
from hypothesis import given
from hypothesis import strategies as st
from test_fuzz_stored import CHANGES, damaged

from fused.io.checkpoint_file import CheckpointError, read_json_object
from fused.models.videomamba.hub import read_description
from fused.train.config_file import read_config
from fused.train.data.captions import read_captions
from fused.train.language.entries import read_entries
from harness.runs import evidence
from harness.runs.store import Run

TALK = {"video": "a.avi", "conversations": [{"from": "human", "value": "<video>\nQ"}, {"from": "gpt", "value": "A"}]}
TEXT = {"id": 3, "messages": [{"role": "user", "content": "Q"}, {"role": "gpt", "content": "A"}]}
CHOICE = {"video": ["a.avi"], "caption": ["a", "b"], "answer": 1}
LISTS: dict[str, tuple[Callable[[Path], Any], list[Any]]] = {
    "conversations": (read_entries, [TALK, TEXT]),
    "captions": (read_captions, [{"video": "a.avi", "caption": "a"}, CHOICE]),
}
NAMES = st.sampled_from(["", "a.avi", "<video>", "a" * 5000, "\0", "\ud800"])
KEYS = st.sampled_from(["video", "from", "value", "x"])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats() | NAMES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=6,
)
FIELDS = st.sampled_from(["video", "image", "caption", "answer", "id", "conversations", "messages"])


@pytest.mark.parametrize("kind", LISTS)
def test_a_damaged_list(kind: str, tmp_path: Path) -> None:
    read, entries = LISTS[kind]
    path = tmp_path / "list.json"
    (tmp_path / "a.avi").write_bytes(b"")
    path.write_text(json.dumps(entries))
    assert read(path)
    data = path.read_bytes()

    @examples(0.5)
    @given(CHANGES)
    def run(changes: list[tuple[float, bytes, int]]) -> None:
        path.write_bytes(damaged(data, changes))
        try:
            read(path)
        except ValueError as error:
            assert str(path) in str(error)

    run()


@pytest.mark.parametrize("kind", LISTS)
def test_a_hostile_value_in_a_list(kind: str, tmp_path: Path) -> None:
    read, entries = LISTS[kind]
    path = tmp_path / "list.json"
    (tmp_path / "a.avi").write_bytes(b"")

    @examples(0.5)
    @given(st.integers(0, 1), FIELDS, VALUES)
    def run(number: int, key: str, value: Any) -> None:
        path.write_text(json.dumps([entry | {key: value} if i == number else entry for i, entry in enumerate(entries)]))
        try:
            read(path)
        except ValueError as error:
            assert str(path) in str(error)

    run()


DEEP = 10**5
READERS: dict[str, Callable[[Path], Any]] = {
    "list.json": read_entries, "captions.json": read_captions, "config.json": read_json_object,
    "hub/config.json": read_description, "run.json": lambda path: Run.open(path.parent),
    "records.jsonl": lambda path: Run.open(path.parent), "train.yaml": lambda path: read_config(path, []),
    "evidence.toml": evidence.read,
}  # fmt: skip


@pytest.mark.parametrize("begins", ["[", '{"a":'])
@pytest.mark.parametrize("name", READERS)
def test_what_is_nested_without_end_is_refused(name: str, begins: str, tmp_path: Path) -> None:
    """By Python's readers, which raise a RecursionError."""
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    text = begins * DEEP
    path.write_text({"train.yaml": f"task: {text}", "evidence.toml": "a = " + text.replace('"a":', "a = ")}.get(name, text))
    if name == "records.jsonl":
        (tmp_path / "run.json").write_text("{}")
        path.write_text(f"{text}\n{text}\n")
    with pytest.raises((ValueError, CheckpointError), match=name.rpartition("/")[2].replace("run.json", "readable run")):
        READERS[name](path)
