"""Checkpoints and runs that are damaged or made to harm: an error that names the file, nothing is executed, nothing hangs."""

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzzing import examples
from hypothesis import given
from hypothesis import strategies as st

from fused.io.checkpoint_file import CheckpointError, read_checkpoint, save_checkpoint
from harness.records.finding import Finding
from harness.records.record import Record
from harness.report.kinds import write
from harness.runs.store import Run, StoreError

CHANGE = st.tuples(st.floats(0, 1, exclude_max=True), st.binary(max_size=9), st.integers(0, 300))
CHANGES = st.lists(CHANGE, min_size=1, max_size=3)


def damaged(data: bytes, changes: list[tuple[float, bytes, int]]) -> bytes:
    """Bytes of which some are replaced by others, or dropped."""
    for share, noise, dropped in changes:
        place = int(share * len(data))
        data = data[:place] + noise + data[place + (dropped if dropped < 250 else len(data)) :]
    return data


@pytest.mark.parametrize("name", ["a.safetensors", "a.pth", "old.pth"])
def test_a_damaged_checkpoint(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    tensors = {"a.weight": torch.randn(3, 4), "b": torch.arange(5), "c": torch.zeros(0)}
    save_checkpoint(tensors, path)
    if name == "old.pth":
        torch.save(tensors, path, _use_new_zipfile_serialization=False)
    whole = path.read_bytes()

    @examples()
    @given(CHANGES)
    def run(changes: list[tuple[float, bytes, int]]) -> None:
        path.write_bytes(damaged(whole, changes))
        try:
            found = read_checkpoint(path)
        except CheckpointError as error:
            assert str(path) in str(error)
        else:
            assert all(isinstance(key, str) for key in found)

    run()


class Call:
    """An object whose unpickling calls a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("function", [os.system, eval, exec, open, os.unlink, __import__, getattr, Path.touch])
@pytest.mark.parametrize("inside", [lambda x: x, lambda x: {"model": x}, lambda x: {"a": [torch.zeros(1), x]}])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_checkpoint_that_calls_a_function_is_refused(function: Any, inside: Any, zipped: bool, tmp_path: Path) -> None:
    harmed = tmp_path / "harmed"
    words = {os.system: f"touch {harmed}", open: str(harmed), os.unlink: str(tmp_path / "kept"), Path.touch: harmed}
    words |= dict.fromkeys((eval, exec), f"open({str(harmed)!r}, 'w')")
    (tmp_path / "kept").touch()
    given_ = (words.get(function, "os"), "w") if function is open else (words.get(function, "os"),)
    torch.save(inside(Call(function, *given_)), tmp_path / "bad.pth", _use_new_zipfile_serialization=zipped)
    (tmp_path / "bare.pth").write_bytes(pickle.dumps(inside(Call(function, *given_))))
    for name in ("bad.pth", "bare.pth"):
        with pytest.raises(CheckpointError, match=name):
            read_checkpoint(tmp_path / name)
    assert (tmp_path / "kept").exists() and not harmed.exists()


def test_a_damaged_run(tmp_path: Path) -> None:
    """It is read without the last line, or refused; what could be read has a page."""
    box = {"gpu": None, "cpu": "a", "packages": {}, "fingerprints": {}, "git": {}, "settings": {}}
    run = Run.create(tmp_path / "run", {"kind": "sanitize", "plan": {}, "box": box, "command": "x"})
    for i in range(4):
        run.add(Record("s", "i", "ours", "memcheck", f"{i} <b>ü", "", "pass", findings=(Finding("y", "errors", 0.0, 0.0),)))
    run.finish("finished")
    files = {path: path.read_bytes() for path in (run.folder / "run.json", run.folder / "records.jsonl")}

    @examples(0.5)
    @given(st.sampled_from(sorted(files)), CHANGES)
    def read(path: Path, changes: list[tuple[float, bytes, int]]) -> None:
        for each, data in files.items():
            each.write_bytes(damaged(data, changes) if each == path else data)
        try:
            found = Run.open(run.folder)
        except StoreError as error:
            assert str(run.folder) in str(error)
        else:
            assert len(found.records) <= 4 or path.name == "records.jsonl"

    read()
    for path, data in files.items():
        path.write_bytes(data)
    assert json.loads((run.folder / "run.json").read_text())["status"] == "finished" and write(Run.open(run.folder)).exists()
