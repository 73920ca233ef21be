"""Tensors of a folder in safetensors: one file, or shards with an index; read one by one, whole or some of their rows."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fused.io.checkpoint_file import CheckpointError, read_json_object, refuse_text
from fused.rules import abbreviate

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


class StoredTensors:
    """The tensors of a folder by name, in files that stay open while this object lives.

    `keys` gives names in the files other names here (None: the same). Raises FileNotFoundError for missing files,
    CheckpointError for damaged ones and a wrong index, ImportError without safetensors.
    """

    def __init__(self, folder: Path, keys: Mapping[str, str] | None = None) -> None:
        files = weight_files(folder)
        self._keys = {name: name for name in files} if keys is None else keys
        handles = {file: open_weights(file) for file in sorted(set(files.values()))}
        self._handles = {name: handles[files[key]] for name, key in self._keys.items()}
        self.shapes = {name: tuple(self._slice(name).get_shape()) for name in self._keys}

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a tensor as stored; float32 for one that is no floating point number."""
        return DTYPES.get(self._slice(name).get_dtype(), torch.float32)

    def read(self, name: str) -> Tensor:
        """Return a tensor."""
        return self._handles[name].get_tensor(self._keys[name])

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return the rows from `start` to `stop`, of which there is one at least, of a tensor; others are not read."""
        return self._slice(name)[start:stop]

    def _slice(self, name: str) -> Any:
        return self._handles[name].get_slice(self._keys[name])


def weight_files(folder: Path) -> dict[str, Path]:
    """Return the file of each tensor. Raises FileNotFoundError for missing files, CheckpointError for a wrong index."""
    if (folder / INDEX).is_file():
        placed = read_json_object(folder / INDEX).get("weight_map")
        if not isinstance(placed, dict) or not all(isinstance(file, str) for file in placed.values()):
            raise CheckpointError(f"{folder / INDEX} has no weight_map")
        files = {name: folder / Path(file).name for name, file in placed.items()}
        for file in sorted(set(files.values())):
            if not file.is_file():
                raise FileNotFoundError(2, f"{INDEX} names a shard that is not there", str(file))
            held = set(_names(file))
            if lacking := [name for name, place in files.items() if place == file and name not in held]:
                raise CheckpointError(f"{file} lacks {abbreviate(lacking)}, which {INDEX} places there")
        return files
    if not (folder / WEIGHTS).is_file():
        raise FileNotFoundError(2, f"the folder holds neither {WEIGHTS} nor {INDEX}", str(folder))
    return dict.fromkeys(_names(folder / WEIGHTS), folder / WEIGHTS)


def open_weights(file: Path) -> Any:
    """Return a safetensors file, open; raise CheckpointError for a damaged one, ImportError without the library."""
    try:
        from safetensors import safe_open
    except ImportError as error:
        raise ImportError("safetensors is not installed: pip install safetensors") from error
    try:
        return safe_open(file, framework="pt", device="cpu")
    except Exception as error:
        refuse_text(file)
        raise CheckpointError(f"{file} is no safetensors file, or it is damaged: {error}") from error


def _names(file: Path) -> list[str]:
    """Return the names of the tensors in a safetensors file."""
    with open_weights(file) as handle:
        return list(handle.keys())
