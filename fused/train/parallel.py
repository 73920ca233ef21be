"""One process or several, by PyTorch's own engines: torchrun's environment, DistributedDataParallel, FSDP2.

torchrun --nproc-per-node 8 -m fused.train --config FILE.yaml parallel=fsdp
"""

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from fused.train.tasks import Task


@dataclass(frozen=True)
class World:
    """This process among all of them. Without a process group it is alone, and the collectives below do nothing."""

    device: torch.device
    rank: int = 0
    size: int = 1
    group: bool = False

    @property
    def first(self) -> bool:
        """Whether it is the one that writes."""
        return self.rank == 0

    def sum(self, values: Sequence[float | Tensor]) -> list[float]:
        """Numbers and tensors () added up over all processes: one collective, one wait for the GPU. Bits as in float64."""
        numbers = [torch.as_tensor(v, device=self.device).detach().to(torch.float64) for v in values]
        total = torch.stack(numbers)
        if self.group:
            dist.all_reduce(total)
        return total.tolist()

    def gather(self, what: Any) -> list[Any]:
        """What every process has, in the order of ranks."""
        if not self.group:
            return [what]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, what)
        return found

    def wait(self) -> None:
        """Until all are here."""
        if self.group:
            dist.barrier()


@contextmanager
def joined(device: str = "auto") -> Iterator[World]:
    """The world that torchrun's environment describes, left when the block ends; alone without one.

    `device` is "cpu", "cuda" or "auto" (a GPU if there is one). Processes speak through NCCL on GPUs, through gloo on CPUs.
    Raises ValueError for "cuda" where there is none.
    """
    cuda = torch.cuda.is_available() if device == "auto" else device == "cuda"
    if cuda and not torch.cuda.is_available():
        raise ValueError("device is 'cuda'; allowed here, where PyTorch finds no GPU: 'auto' or 'cpu'")
    if "RANK" not in os.environ:
        yield World(torch.device("cuda" if cuda else "cpu"))
        return
    place = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(place)
    dist.init_process_group("nccl" if cuda else "gloo", device_id=place if cuda else None)
    try:
        yield World(place, dist.get_rank(), dist.get_world_size(), True)
    finally:
        dist.destroy_process_group()


def spread(task: Task, parallel: str, world: World) -> nn.Module:
    """What to call in place of the task, which is the task itself or a wrapper of it; its parameters are then spread.

    `parallel` is "ddp" (every process holds all), "fsdp" (each holds a part of every block), or "auto": ddp if there are
    several. Raises ValueError if it needs torchrun and there was none.
    """
    if parallel != "auto" and not world.group:
        raise ValueError(
            f"parallel is {parallel!r}; allowed without torchrun: 'auto' (torchrun --nproc-per-node N -m fused.train)"
        )
    if parallel == "fsdp":
        mesh = init_device_mesh(world.device.type, (world.size,))
        # parameters stay float32, as under DDP, and autocast chooses what is computed in less: rounding A_log would be
        # another model, and these models are small enough to be gathered in float32
        policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
        # PyTorch warns of outputs that are views, in case somebody writes to them in place; nobody does
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
        for block in task.student.layers:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(task.student, mesh=mesh, mp_policy=policy)
        return task
    if world.size == 1:
        return task
    # masked alignment gives the last mixer and what pools no gradient: DDP, which waits for every parameter, has to look
    # in each backward which ones will come
    return DistributedDataParallel(task, find_unused_parameters=task.partial)


def shared(module: nn.Module, task: Task, now: bool) -> AbstractContextManager[object]:
    """For one part of a step: gradients are added up over processes `now`, or with a later part."""
    if isinstance(task.student, FSDPModule):
        task.student.set_requires_gradient_sync(now)
    if isinstance(module, DistributedDataParallel) and not now:
        return module.no_sync()
    return nullcontext()


def norm_of(gradients: Tensor) -> Tensor:
    """A norm () of all gradients, put together where they are spread."""
    return gradients.full_tensor() if hasattr(gradients, "full_tensor") else gradients
