"""Files of weights as trainers and servers leave them: objects beside tensors, other endings, and what is no checkpoint."""

import argparse
import os
import pathlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fused import read_checkpoint, save_checkpoint
from fused.io.checkpoint_file import CheckpointError

WEIGHTS = {"a.weight": torch.arange(6.0).view(2, 3), "a.bias": torch.ones(2, dtype=torch.bfloat16)}


@pytest.mark.parametrize(
    "beside",
    [
        np.float64(0.75), np.int64(3), np.bool_(True), np.float32(1), np.array([1.5, 2]), np.zeros((2, 3), np.int8),
        argparse.Namespace(out=pathlib.PosixPath("/runs"), lr=1e-3), {"best": [np.float64(1), None]},
    ],
    ids=repr,
)  # fmt: skip
@pytest.mark.parametrize("old", [False, True], ids=["zip", "legacy"])
def test_what_trainers_store_beside_weights(beside: Any, old: bool, tmp_path: Path) -> None:
    torch.save({"model": WEIGHTS, "beside": beside}, tmp_path / "x.pth", _use_new_zipfile_serialization=not old)
    content = read_checkpoint(tmp_path / "x.pth")
    assert torch.equal(content["model"]["a.weight"], WEIGHTS["a.weight"])
    assert np.array_equal(content["beside"], beside) if isinstance(beside, np.ndarray) else content["beside"] == beside


def test_numbers_of_another_numpy(tmp_path: Path) -> None:
    """NumPy 1 and 2 write them under names of two modules; each is read by the other."""
    torch.save({"model": WEIGHTS, "best": np.float64(0.75)}, tmp_path / "x.pth", _use_new_zipfile_serialization=False)
    content = (tmp_path / "x.pth").read_bytes()
    there, other = b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n"
    there, other = (there, other) if there in content else (other, there)
    assert there in content
    (tmp_path / "x.pth").write_bytes(content.replace(there, other))
    assert read_checkpoint(tmp_path / "x.pth")["best"] == 0.75


def test_arrays_of_objects_are_refused(tmp_path: Path) -> None:
    for harmful in (np.array([os.system], dtype=object), np.array([{}], dtype=object)):
        torch.save({"model": WEIGHTS, "beside": harmful}, tmp_path / "x.pth")
        with pytest.raises(CheckpointError, match="is refused"):
            read_checkpoint(tmp_path / "x.pth")


@pytest.mark.parametrize("name", ["model.bin", "MODEL.SAFETENSORS", "weights", "model.pth"])
def test_safetensors_by_their_content(name: str, tmp_path: Path) -> None:
    content = save_checkpoint(WEIGHTS, tmp_path / "x.safetensors").read_bytes()
    (tmp_path / name).write_bytes(content)
    got = read_checkpoint(tmp_path / name)
    assert got.keys() == WEIGHTS.keys() and all(torch.equal(got[key], WEIGHTS[key]) for key in got)
    (tmp_path / name).write_bytes(content[:-5])
    with pytest.raises(CheckpointError, match="no safetensors file, or it is damaged"):
        read_checkpoint(tmp_path / name)


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        ("<!DOCTYPE html>\n<title>404 Not Found</title>" * 9, "is text, .*it begins with '<!DOCTYPE html>"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull fetches"),
        ("\x89{}" * 99, "damaged"),
    ],
)
@pytest.mark.parametrize("name", ["x.pth", "x.safetensors"])
def test_what_is_no_checkpoint(name: str, content: str, wanted: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(CheckpointError, match=f"{name} .*{wanted}"):
        read_checkpoint(tmp_path / name)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_an_archive_of_torchscript_names_the_way_out(tmp_path: Path) -> None:
    torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)).save(str(tmp_path / "x.pt"))
    with pytest.raises(CheckpointError, match=r"x.pt is a TorchScript archive, .*torch.jit.load.*state_dict\(\)"):
        read_checkpoint(tmp_path / "x.pt")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_the_home_folder(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    assert save_checkpoint(WEIGHTS, f"~/weights/x{suffix}") == tmp_path / "home" / "weights" / f"x{suffix}"
    assert read_checkpoint(f"~/weights/x{suffix}").keys() == WEIGHTS.keys()
    assert not (tmp_path / "~").exists()
