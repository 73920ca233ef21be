"""Weights on disk: PyTorch's files, read without running code in them, and safetensors."""

import _codecs
import argparse
import functools
import json
import os
import pickle
import re
from collections.abc import Mapping
from pathlib import Path, PosixPath
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
    except (ValueError, RecursionError) as error:  # RecursionError: nested too deeply
        raise CheckpointError(f"{path} is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}; allowed: an object")
    return content


def read_checkpoint(path: str | Path) -> Mapping[str, Any]:
    """Return the dictionary in a file, its tensors on the CPU.

    A file with the suffix .safetensors, or with such content, is read as such, any other as written by `torch.save`. No code in
    the file is run: the only Python objects that are made are plain containers and what trainers store with the weights,
    `argparse.Namespace`, paths, and NumPy's numbers and arrays of them. ~ in front is the home folder. Raises
    FileNotFoundError, TypeError for another type than a path, and CheckpointError for a folder, a file with other objects, a
    damaged file, or one that holds no dictionary.
    """
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"path is a {type(path).__name__}; allowed: the path of a file")
    path = Path(os.path.expanduser(path))
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder; allowed: a file. from_pretrained reads a folder that save_pretrained wrote")
    if not path.is_file():
        raise FileNotFoundError(2, "no such checkpoint", str(path))
    content = _read_safetensors(path) if _is_safetensors(path) else _read_pickle(path)
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}; a checkpoint is a dictionary of tensors")
    return content


def save_checkpoint(model_or_state_dict: nn.Module | Mapping[str, Any], path: str | Path) -> Path:
    """Write a model's weights, or a dictionary, atomically, and return the path.

    The suffix .safetensors selects that format, which holds tensors only. Any other selects `torch.save`'s, for dictionaries of
    tensors, plain numbers, strings and containers of those, such as a trainer's {"model": ..., "optimizer": ...}. Missing
    folders are made, and ~ in front is the home folder. Raises OSError if the disk is full (the old file stays), TypeError
    unless a model or a dictionary is given, and for values that the format cannot hold.
    """
    path, given = Path(os.path.expanduser(path)), model_or_state_dict
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


def _is_safetensors(path: Path) -> bool:
    """Return whether a file's name or its first bytes, the length of a header and its bracket, are those of safetensors."""
    if path.suffix.lower() == SAFETENSORS:
        return True
    head = _first_bytes(path, 9)
    return head[8:] == b"{" and int.from_bytes(head[:8], "little") < path.stat().st_size


def _read_safetensors(path: Path) -> Mapping[str, Tensor]:
    """Return the tensors of a safetensors file; raise CheckpointError for a damaged one."""
    library = _safetensors()
    try:
        return library.load_file(path, device="cpu")
    except Exception as error:
        refuse_text(path)
        raise CheckpointError(f"{path} is no safetensors file, or it is damaged: {error}") from error


def _read_pickle(path: Path) -> Any:
    """Return the content of a file of `torch.save`; raise CheckpointError for one that is damaged or not safe to read."""
    try:
        with torch.serialization.safe_globals(_plain_classes()):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        refuse_text(path)
        match = re.search(r"GLOBAL ([\w.]+)", str(error))  # not PyTorch's message: it recommends to run the file
        reason = f"besides tensors it holds {match[1]}" if match else "it holds more than tensors, or is damaged"
        raise CheckpointError(
            f"{path} is refused, nothing of it was run: {reason}. If you trust whoever wrote it, load it yourself and pass its "
            "state_dict"
        ) from error
    except Exception as error:  # a damaged file may raise any exception in the reader
        if "TorchScript" in str(error):
            way_out = "load it with torch.jit.load, and pass its state_dict()"
            raise CheckpointError(f"{path} is a TorchScript archive, which holds code; {way_out}") from error
        refuse_text(path)
        raise CheckpointError(
            f"{path} cannot be read, it is no checkpoint or it is damaged ({type(error).__name__})"
        ) from error


def refuse_text(path: Path) -> None:
    """Raise CheckpointError for a file that begins as text, such as a page of a server or a pointer of Git LFS."""
    head = _first_bytes(path, 60)
    if not head or not all(byte in b"\t\r\n" or 32 <= byte < 127 for byte in head):
        return
    lfs = "; it stands for a file of Git LFS, which git lfs pull fetches" if head.startswith(b"version https://git-lfs") else ""
    raise CheckpointError(f"{path} is text, no checkpoint, or it is damaged: it begins with {head.decode()!r}{lfs}")


def _first_bytes(path: Path, count: int) -> bytes:
    """Return the first bytes of a file; none of one that cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(count)
    except OSError:
        return b""


@functools.cache
def _plain_classes() -> list[Any]:
    """Return the classes and functions, beside those that PyTorch allows, of what trainers store beside weights.

    Of NumPy they make numbers and arrays of numbers. Arrays of objects are not among them.
    """
    found: list[Any] = [argparse.Namespace, PosixPath]
    try:
        import numpy as np
    except ImportError:
        return found
    make_number, make_array = np.float64(0).__reduce__()[0], np.zeros(0).__reduce__()[0]
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):  # of NumPy 1 and 2
        found += [(make_number, f"{module}.scalar"), (make_array, f"{module}._reconstruct")]
    codes = np.typecodes["AllInteger"] + np.typecodes["AllFloat"] + "?"
    return [*found, _codecs.encode, np.ndarray, np.dtype, *{type(np.dtype(code)) for code in codes}]


def _safetensors() -> Any:
    """Return the module safetensors.torch; raise ImportError with what to do."""
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError("safetensors is not installed: pip install safetensors, or use files of torch.save (.pth)") from error
    return safetensors.torch
