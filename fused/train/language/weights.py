"""The memory of a language model's weights in a training, and their reading into it, of shards in each process its own."""

import logging
import os
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fused.models.vamba.begin import Beginning
from fused.models.vamba.load import assign
from fused.runtime.memory import free_bytes

STORED = (torch.bfloat16, torch.float16)
GIB = 2**30

_log = logging.getLogger("fused")


def keep_frozen_as_stored(beginning: Beginning) -> None:
    """Give weights of products that do not learn the dtype of the folder, if that has 16 bits, on the meta device.

    That is for autocast, under which a product's result is the same. Other tensors are float32.
    """
    for path, module in beginning.model.named_modules():
        if type(module) is nn.Linear and not module.weight.requires_grad and "vision_mixer" not in path:
            dtype = beginning.stored_dtype(f"{path}.weight")
            if dtype in STORED:
                module.weight = nn.Parameter(module.weight.detach().to(dtype), requires_grad=False)


def load_weights(student: nn.Module, beginning: Beginning, device: torch.device) -> None:
    """Put a student, of which `beginning.model` is a part, from the meta device on `device`, with the weights of a folder.

    A parameter that is sharded takes its own rows, and no others are read. The memory is said first, and refused by a
    ValueError if it is not free.
    """
    _check_memory(student, beginning, device)
    buffers = dict(student.named_buffers())  # which hold their values
    student.to_empty(device=device)
    for name, value in buffers.items():
        assign(student, name, value.to(device))
    beginning.load(own_rows)


def own_rows(parameter: nn.Parameter) -> tuple[Tensor, int, int] | None:
    """Return the memory of this process's rows of a parameter, and the numbers of the first and behind the last; None for none.

    FSDP2 shards the first axis into parts of equal length, the last of which may be shorter or empty.
    """
    if not isinstance(parameter, DTensor):
        return parameter.detach(), 0, len(parameter)
    mesh, length = parameter.device_mesh, len(parameter)
    rows = -(-length // mesh.size())
    start = min(rows * mesh.get_local_rank(), length)
    stop = min(start + rows, length)
    with torch.no_grad():
        return (parameter.to_local(), start, stop) if start < stop else None


def _check_memory(student: nn.Module, beginning: Beginning, device: torch.device) -> None:
    """Log the memory of the weights in each process; raise ValueError if it is not free."""
    sizes = list(_sizes(student))
    weights, learnt = sum(sizes), sum(n for n, p in zip(sizes, student.parameters(), strict=True) if p.requires_grad)
    total = weights + 3 * learnt  # gradients, and two moments of AdamW
    read = max(*sizes, beginning.mixer_bytes)
    _log.info(
        "weights: %.2f GiB a process on %s, %.2f GiB with gradients and moments of the %.2f GiB that learn; up to %.2f GiB of "
        "host memory beside while they are read", weights / GIB, device.type, total / GIB, learnt / GIB, read / GIB,
    )  # fmt: skip
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if device.type == "cpu" else 1
    free = free_bytes(device)
    if free is not None and here * total > free:
        raise ValueError(
            f"start is a model that takes {here * total / GIB:.2f} GiB on this {device.type}, with gradients and moments, and "
            f"{free / GIB:.2f} GiB are free; allowed: parallel=fsdp with more processes, or fewer parts in language.trainable"
        )


def _sizes(student: nn.Module) -> Iterator[int]:
    """Yield the bytes of each parameter in this process."""
    for parameter in student.parameters():
        yield (parameter.to_local() if isinstance(parameter, DTensor) else parameter).nbytes
