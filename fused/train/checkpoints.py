"""Checkpoints of a training: folders of torch.distributed.checkpoint, there whole or not at all.

    checkpoints/step-00000500/    parameters and the optimiser's tensors, by name; training.json: the step, the scaler
    checkpoints/last              the name of the newest whole one

A checkpoint is written to a draft folder, renamed in one step, and then named in `last`, in one step too: a process that is
killed anywhere in between leaves `last` at the one before. Tensors are stored in parts, as they are spread, and go back to
any number of processes. Rates are not stored: they follow from the configuration and the step.
"""

import json
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import BytesStorageMetadata
from torch.optim import Optimizer

from fused.io.atomic_write import NotWritten, written_whole
from fused.io.checkpoint_file import CheckpointError
from fused.train.parallel import World

POINTER, FACTS = "last", "training.json"


def save(folder: Path, facts: dict[str, Any], model: nn.Module, optimizer: Optimizer, world: World, keep: int) -> Path:
    """Write the checkpoint of step `facts["step"]`, name it in `last`, keep the newest `keep`; its path.

    Every process of the world calls it. `facts` are plain numbers and strings. Raises NotWritten, an OSError, in all
    processes if it cannot be written; what was there before stays.
    """
    final = folder / f"step-{facts['step']:08d}"
    draft = folder / f".{final.name}.part"
    if world.first:
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob(".*.part"):  # of processes that were killed; nobody else writes here
            old.unlink() if old.is_file() else shutil.rmtree(old)
        if final.is_dir():  # whole, but `last` was not to name it any more
            shutil.rmtree(final)
    world.wait()
    error: BaseException | None = None
    try:
        with _quiet():
            dcp.save(_tensors(model, optimizer), checkpoint_id=draft, no_dist=not world.group)
        if world.first:
            with written_whole(draft / FACTS) as file:
                file.write_text(json.dumps(facts))
            os.replace(draft, final)
            with written_whole(folder / POINTER) as file:
                file.write_text(final.name + "\n")
    except (Exception, CheckpointException) as problem:  # any failure to write; PyTorch's own is no Exception
        error = problem
    if any(world.gather(error is not None)):
        if world.first:
            shutil.rmtree(draft, ignore_errors=True)
        free = shutil.disk_usage(folder).free / 2**20
        raise NotWritten(
            f"{final}: not written, the checkpoint before it stays ({free:.0f} MiB are free there): {_reason(error)}"
        ) from error
    if world.first:
        _forget(final, keep)
    return final


def newest(folder: Path) -> Path | None:
    """The newest whole checkpoint, None if there is none. Raises CheckpointError if `last` names one that is gone."""
    if not (folder / POINTER).is_file():
        return None
    found = folder / (folder / POINTER).read_text().strip()
    if not (found / FACTS).is_file():
        raise CheckpointError(
            f"{folder / POINTER} names {found.name}, which is not there; write the name of one that is into it"
        )
    return found


def facts_of(checkpoint: Path) -> dict[str, Any]:
    """What `save` was told beside the tensors."""
    return json.loads((checkpoint / FACTS).read_text())


def load(checkpoint: Path, model: nn.Module, optimizer: Optimizer, world: World) -> None:
    """Parameters and the optimiser's tensors, into a model that is already spread, bit for bit.

    Every process of the world calls it. Raises CheckpointError for one that is damaged or of another model.
    """
    try:
        metadata = dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata
        _make_room(metadata, model, optimizer)
        tensors = _tensors(model, optimizer)
        with _quiet():
            dcp.load(tensors, checkpoint_id=checkpoint, no_dist=not world.group)
    except (Exception, CheckpointException) as error:  # whatever its reader trips over
        raise CheckpointError(f"{checkpoint} cannot be read, or is of another model: {_reason(error)}") from error


def _tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """Everything that is stored, by name; the tensors themselves, so that they are read in place."""
    tensors = {f"model.{name}": value.detach() for name, value in model.named_parameters()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{key}.{name}"] = value
    return tensors


def _make_room(metadata: dict[str, Any], model: nn.Module, optimizer: Optimizer) -> None:
    """Tensors of the optimiser, which makes them at its first step, for what a checkpoint holds: parameters that never had
    a gradient have none there."""
    parameters = dict(model.named_parameters())
    for entry, about in metadata.items():
        if not entry.startswith("optimizer.") or isinstance(about, BytesStorageMetadata):
            continue
        _, key, name = entry.split(".", 2)
        like = parameters[name].detach()
        whole = tuple(about.size) == tuple(like.shape)
        dtype = about.properties.dtype
        optimizer.state[parameters[name]][key] = (
            torch.zeros_like(like, dtype=dtype) if whole else torch.zeros(about.size, dtype=dtype)
        )


def _forget(final: Path, keep: int) -> None:
    """Remove all but the newest up to this one; each loses its name first, so that half a folder never has one.

    Later ones are of a training that was taken back to an earlier step: they are replaced when that step comes again.
    """
    for old in sorted(path for path in final.parent.glob("step-*") if path.name <= final.name)[:-keep]:
        doomed = final.parent / f".{old.name}.part"
        os.replace(old, doomed)
        shutil.rmtree(doomed, ignore_errors=True)


@contextmanager
def _quiet() -> Iterator[None]:
    """PyTorch warns that there is no process group, also where it was told so."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield


def _reason(error: BaseException | None) -> str:
    """In one line. PyTorch wraps what happened in every process, with its traceback, into one exception, and its writer
    stumbles once more over a file that the disk did not take: what the system said is behind that."""
    if error is None:
        return "another process could not"
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    behind: BaseException | None = error
    while behind is not None and not isinstance(behind, OSError):
        behind = behind.__cause__ or behind.__context__
    error = behind or error
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
