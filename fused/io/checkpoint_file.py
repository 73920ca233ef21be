"""Weights on disk: PyTorch's files, read without running code in them, and safetensors."""

import argparse
import json
import os
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fused.io.atomic_write import atomic_write

SAFETENSORS = ".safetensors"


class CheckpointError(RuntimeError):
    """The error for a checkpoint that cannot be read, is not safe to read, or does not fit; the message says what to do."""


def read_json_object(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file. Raises CheckpointError for anything else in it, and OSError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}; allowed: an object")
    return content


def read_checkpoint(path: str | Path) -> Mapping[str, Any]:
    """Return the dictionary in a file, its tensors on the CPU.

    A file with the suffix .safetensors is read as such, any other as written by `torch.save`. No code in the file is run: the
    only Python objects that are made are plain containers, and `argparse.Namespace`, which trainers store with the weights.
    Raises FileNotFoundError, TypeError for what is no path, and CheckpointError for a folder, a file with other objects, a
    damaged file, or one that holds no dictionary.
    """
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"path is a {type(path).__name__}; allowed: the path of a file")
    path = Path(path)
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder; allowed: a file. from_pretrained reads a folder that save_pretrained wrote")
    if not path.is_file():
        raise FileNotFoundError(2, "no such checkpoint", str(path))
    content = _read_safetensors(path) if path.suffix == SAFETENSORS else _read_pickle(path)
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}; a checkpoint is a dictionary of tensors")
    return content


def save_checkpoint(model_or_state_dict: nn.Module | Mapping[str, Any], path: str | Path) -> Path:
    """Write a model's weights, or a dictionary, atomically, and return the path.

    The suffix .safetensors selects that format, which holds tensors only. Any other selects `torch.save`'s, for dictionaries
    of tensors, plain numbers, strings and containers of those, such as a trainer's {"model": ..., "optimizer": ...}. Missing
    folders are made. Raises OSError if the disk is full (the old file stays), TypeError for what is neither a model nor a
    dictionary, and for values that the format cannot hold.
    """
    path, given = Path(path), model_or_state_dict
    if not isinstance(given, nn.Module | Mapping):
        raise TypeError(f"model_or_state_dict is a {type(given).__name__}; allowed: a model, or a dictionary of tensors")
    state = given.state_dict() if isinstance(given, nn.Module) else given
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix != SAFETENSORS:
        with atomic_write(path) as draft:
            torch.save(dict(state), draft)
        return path
    tensors = {name: _as_tensor(name, value) for name, value in state.items()}
    content = _safetensors().save(tensors, metadata={"format": "pt"})
    with atomic_write(path) as draft:  # the library's save_file is not atomic
        draft.write_bytes(content)
    return path


def _as_tensor(name: str, value: object) -> Tensor:
    """Return an entry as a contiguous tensor; raise TypeError if it is no tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}; safetensors holds tensors only, save it with the suffix .pth")
    return value.detach().contiguous()


def _read_safetensors(path: Path) -> Mapping[str, Tensor]:
    """Return the tensors of a safetensors file; raise CheckpointError for a damaged one."""
    library = _safetensors()
    try:
        return library.load_file(path, device="cpu")
    except Exception as error:
        raise CheckpointError(f"{path} is no safetensors file, or it is damaged: {error}") from error


def _read_pickle(path: Path) -> Any:
    """Return the content of a file of `torch.save`; raise CheckpointError for one that is damaged or not safe to read."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        match = re.search(r"GLOBAL ([\w.]+)", str(error))  # not PyTorch's message: it recommends to run the file
        reason = f"besides tensors it holds {match[1]}" if match else "it holds more than tensors, or is damaged"
        raise CheckpointError(
            f"{path} is refused, nothing of it was run: {reason}. If you trust whoever wrote it, load it yourself and pass its "
            "state_dict"
        ) from error
    except Exception as error:  # a damaged file may raise any exception in the reader
        raise CheckpointError(
            f"{path} cannot be read, it is no checkpoint or it is damaged ({type(error).__name__})"
        ) from error


def _safetensors() -> Any:
    """Return the module safetensors.torch; raise ImportError with what to do."""
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError("safetensors is not installed: pip install safetensors, or use files of torch.save (.pth)") from error
    return safetensors.torch
