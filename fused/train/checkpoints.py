"""Checkpoints of a training: folders of torch.distributed.checkpoint, written atomically.

    checkpoints/step-00000500/    parameters, the optimiser's tensors and the EMA, by name; training.json: the step, the scaler
    checkpoints/last              the name of the newest complete one

A checkpoint is written to a draft folder, which is then renamed, and then named in `last`. Each of the two is one atomic
operation, so a process that is killed at any moment leaves `last` at a complete checkpoint. Sharded tensors are stored as
shards and can be loaded by any number of processes. Learning rates are not stored: they follow from the configuration and
the step.
"""

import json
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import BytesStorageMetadata
from torch.optim import Optimizer

from fused.io.atomic_write import NotWritten, atomic_write
from fused.io.checkpoint_file import CheckpointError
from fused.train.parallel import World

POINTER, STATE_FILE = "last", "training.json"


def save(
    folder: Path, state: dict[str, Any], model: nn.Module, optimizer: Optimizer, ema: Mapping[str, Tensor], world: World,
    keep: int,
) -> Path:  # fmt: skip
    """Write the checkpoint of step `state["step"]`, name it in `last`, keep the newest `keep`, and return its path.

    Every process of the world calls this function. `state` is plain data for JSON, `ema` holds averages of parameters by name,
    or nothing. Raises NotWritten, an OSError, in all processes if the checkpoint cannot be written; the one before it stays.
    """
    final = folder / f"step-{state['step']:08d}"
    draft = folder / f".{final.name}.part"
    if world.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob(".*.part"):  # drafts of killed processes; a folder has one run at a time
            old.unlink() if old.is_file() else shutil.rmtree(old)
        if final.is_dir():  # complete, but its process was killed before it was named in `last`
            shutil.rmtree(final)
    world.barrier()
    error: BaseException | None = None
    try:
        with _without_group_warning():
            dcp.save(_tensors(model, optimizer, ema), checkpoint_id=draft, no_dist=not world.has_group)
        if world.is_main:
            with atomic_write(draft / STATE_FILE) as file:
                file.write_text(json.dumps(state))
            os.replace(draft, final)
            with atomic_write(folder / POINTER) as file:
                file.write_text(final.name + "\n")
    except (Exception, CheckpointException) as problem:  # PyTorch's CheckpointException is no Exception
        error = problem
    if any(world.all_gather(error is not None)):
        if world.is_main:
            shutil.rmtree(draft, ignore_errors=True)
        free = shutil.disk_usage(folder).free / 2**20
        raise NotWritten(
            f"{final}: not written, the checkpoint before it stays ({free:.0f} MiB are free there): {_root_cause(error)}"
        ) from error
    if world.is_main:
        _remove_old(final, keep)
    return final


def newest(folder: Path) -> Path | None:
    """Return the newest complete checkpoint, None if there is none. Raise CheckpointError if `last` names a missing one."""
    if not (folder / POINTER).is_file():
        return None
    checkpoint = folder / (folder / POINTER).read_text().strip()
    if not (checkpoint / STATE_FILE).is_file():
        raise CheckpointError(
            f"{folder / POINTER} names {checkpoint.name}, which is not there; write the name of one that is into it"
        )
    return checkpoint


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Return the `state` that was given to `save`."""
    return json.loads((checkpoint / STATE_FILE).read_text())


def load(checkpoint: Path, model: nn.Module, optimizer: Optimizer, ema: Mapping[str, Tensor], world: World) -> None:
    """Load parameters, the optimiser's tensors and averages, bit for bit, into a model and `ema` that are already sharded.

    Every process of the world calls this function. Raises CheckpointError for a checkpoint that is damaged or of another
    model.
    """
    try:
        metadata = dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata
        _allocate_optimizer_state(metadata, model, optimizer)
        tensors = _tensors(model, optimizer, ema)
        with _without_group_warning():
            dcp.load(tensors, checkpoint_id=checkpoint, no_dist=not world.has_group)
    except (Exception, CheckpointException) as error:  # a damaged file can raise anything
        raise CheckpointError(f"{checkpoint} cannot be read, or is of another model: {_root_cause(error)}") from error


def _tensors(model: nn.Module, optimizer: Optimizer, ema: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return all tensors of a checkpoint by name. They share memory with the arguments, so that loading is in place.

    A parameter that does not learn is what the run began with.
    """
    tensors = {f"model.{name}": value.detach() for name, value in model.named_parameters() if value.requires_grad}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{key}.{name}"] = value
    return tensors | {f"ema.{name}": value for name, value in ema.items()}


def _allocate_optimizer_state(metadata: dict[str, Any], model: nn.Module, optimizer: Optimizer) -> None:
    """Create the optimiser's tensors that a checkpoint holds; the optimiser itself creates them in its first step.

    A parameter that never had a gradient has none.
    """
    parameters = dict(model.named_parameters())
    for entry, stored in metadata.items():
        if not entry.startswith("optimizer.") or isinstance(stored, BytesStorageMetadata):
            continue
        _, key, name = entry.split(".", 2)
        parameter = parameters[name].detach()
        dtype = stored.properties.dtype
        # a moment has the parameter's shape, and its sharding; the step counter is a scalar
        if tuple(stored.size) == tuple(parameter.shape):
            tensor = torch.zeros_like(parameter, dtype=dtype)
        else:
            tensor = torch.zeros(stored.size, dtype=dtype, device=parameter.device)
        optimizer.state[parameters[name]][key] = tensor


def _remove_old(final: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints up to `final`.

    A checkpoint is renamed before it is deleted, so that no incomplete folder has a checkpoint's name. Checkpoints of later
    steps stay: they are of a run that was set back to an earlier step, and are replaced when it reaches theirs.
    """
    for old in sorted(path for path in final.parent.glob("step-*") if path.name <= final.name)[:-keep]:
        renamed = final.parent / f".{old.name}.part"
        os.replace(old, renamed)
        shutil.rmtree(renamed, ignore_errors=True)


@contextmanager
def _without_group_warning() -> Iterator[None]:
    """Suppress PyTorch's warning that there is no process group, which it gives even with no_dist=True."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield


def _root_cause(error: BaseException | None) -> str:
    """Return the cause of a failure in one line.

    PyTorch wraps the errors of all processes, with tracebacks, into one exception; and after a failed write its writer fails
    again on closing the file. The operating system's error, which matters, is among the causes.
    """
    if error is None:
        return "another process could not"
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    error = cause or error
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
