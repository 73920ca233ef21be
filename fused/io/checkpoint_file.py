"""Weights on disk: PyTorch's files, read without running what is in them, and safetensors."""

import argparse
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fused.io.atomic_write import written_whole

SAFETENSORS = ".safetensors"


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be read, is not safe to read, or does not fit the model; the message says what to do."""


def read_checkpoint(path: str | Path) -> Mapping[str, Any]:
    """What a file holds, its tensors on the CPU: safetensors by that suffix, else what `torch.save` wrote.

    Nothing in the file is run: of Python's objects only plain containers, and `argparse.Namespace` as trainers leave it beside
    the weights, are made. Raises FileNotFoundError, or CheckpointError for a file with anything else in it, for one that is
    damaged, and for one that is no dictionary.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(2, "no such checkpoint", str(path))
    content = _read_safetensors(path) if path.suffix == SAFETENSORS else _read_pickle(path)
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}; a checkpoint is a dictionary of tensors")
    return content


def save_checkpoint(what: nn.Module | Mapping[str, Any], path: str | Path) -> Path:
    """Write a model's weights, or a dictionary, whole or not at all, and return the path.

    The suffix .safetensors asks for that format, which holds tensors only; any other is `torch.save`'s, for dictionaries of
    tensors, plain numbers, strings and containers of those, such as a trainer's {"model": ..., "optimizer": ...}. Missing
    folders are made. Raises OSError if the disk is full (the file that was there stays), TypeError for what the format does
    not hold.
    """
    path, state = Path(path), what.state_dict() if isinstance(what, nn.Module) else what
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix != SAFETENSORS:
        with written_whole(path) as draft:
            torch.save(dict(state), draft)
        return path
    tensors = {name: _stored(name, value) for name, value in state.items()}
    content = _safetensors().save(tensors, metadata={"format": "pt"})
    with written_whole(path) as draft:  # the library's own way to a file leaves what it had when it is killed
        draft.write_bytes(content)
    return path


def _stored(name: str, value: object) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}; safetensors holds tensors only, save it with the suffix .pth")
    return value.detach().contiguous()


def _read_safetensors(path: Path) -> Mapping[str, Tensor]:
    library = _safetensors()
    try:
        return library.load_file(path, device="cpu")
    except Exception as error:
        raise CheckpointError(f"{path} is no safetensors file, or it is damaged: {error}") from error


def _read_pickle(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))  # PyTorch's own message recommends to run it
        what = f"besides tensors it holds {named[1]}" if named else "it holds more than tensors, or is damaged"
        raise CheckpointError(
            f"{path} is refused, nothing of it was run: {what}. If you trust whoever wrote it, load it yourself and pass its "
            "state_dict"
        ) from error
    except Exception as error:  # a cut file gives whatever its reader trips over
        raise CheckpointError(
            f"{path} cannot be read, it is no checkpoint or it is damaged ({type(error).__name__})"
        ) from error


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError("safetensors is not installed: pip install safetensors, or use files of torch.save (.pth)") from error
    return safetensors.torch
