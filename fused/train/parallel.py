"""One process or several, with PyTorch's own means: torchrun's environment, DistributedDataParallel, FSDP2.

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
    """This process's device and rank, and the collectives. Without a process group the collectives are trivial."""

    device: torch.device
    rank: int = 0
    size: int = 1
    has_group: bool = False

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which alone writes files and prints."""
        return self.rank == 0

    def all_sum(self, values: Sequence[float | Tensor]) -> list[float]:
        """Return the sum of each number or tensor () over all processes, in float64.

        It takes one collective and waits for the GPU once.
        """
        numbers = [torch.as_tensor(v, device=self.device).detach().to(torch.float64) for v in values]
        total = torch.stack(numbers)
        if self.has_group:
            dist.all_reduce(total)
        return total.tolist()

    def all_gather(self, value: Any) -> list[Any]:
        """Return the picklable values of all processes, in the order of ranks."""
        if not self.has_group:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def any(self, flag: bool) -> bool:
        """Return whether `flag` is true in any process. It takes one collective."""
        return self.all_sum([flag])[0] > 0 if self.has_group else flag

    def barrier(self) -> None:
        """Wait until all processes have called this."""
        if self.has_group:
            dist.barrier()


@contextmanager
def joined_world(device: str = "auto") -> Iterator[World]:
    """Join the process group of torchrun's environment, and leave it when the block ends; without torchrun there is none.

    `device` is "cpu", "cuda" or "auto" (a GPU if there is one). GPUs use NCCL, CPUs gloo. Raises ValueError for "cuda" where
    there is no GPU.
    """
    cuda = torch.cuda.is_available() if device == "auto" else device == "cuda"
    if cuda and not torch.cuda.is_available():
        raise ValueError("device is 'cuda'; allowed here, where PyTorch finds no GPU: 'auto' or 'cpu'")
    if "RANK" not in os.environ:
        yield World(torch.device("cuda" if cuda else "cpu"))
        return
    local_device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(local_device)
    dist.init_process_group("nccl" if cuda else "gloo", device_id=local_device if cuda else None)
    try:
        yield World(local_device, dist.get_rank(), dist.get_world_size(), True)
    finally:
        dist.destroy_process_group()


def parallelize(task: Task, parallel: str, world: World) -> nn.Module:
    """Return the module to call in place of the task: the task itself, or DDP around it. FSDP2 shards its parameters.

    `parallel` is "ddp" (every process holds all parameters), "fsdp" (each holds a shard of every block), or "auto": ddp if
    there are several processes. Raises ValueError for ddp and fsdp without torchrun.
    """
    if parallel != "auto" and not world.has_group:
        raise ValueError(
            f"parallel is {parallel!r}; allowed without torchrun: 'auto' (torchrun --nproc-per-node N -m fused.train)"
        )
    if parallel == "fsdp":
        mesh = init_device_mesh(world.device.type, (world.size,))
        # Parameters stay float32, as under DDP, and autocast chooses the operations of lower precision. A rounded A_log would
        # be another model, and these models are small enough to be gathered in float32.
        policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
        # PyTorch warns of outputs that are views, which must not be written to in place; nothing here does
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
        for block in task.student.layers:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(task.student, mesh=mesh, mp_policy=policy)
        if world.device.type == "cpu":  # gloo takes a mean for a sum in PyTorch 2.8
            for module in task.student.modules():
                if isinstance(module, FSDPModule):
                    module.set_force_sum_reduction_for_comms(True)
        return task
    if world.size == 1:
        return task
    # DDP waits for the gradient of every parameter. Where some never get one, it has to find them in each backward.
    return DistributedDataParallel(task, find_unused_parameters=task.has_unused_parameters)


def gradient_sync(module: nn.Module, task: Task, enabled: bool) -> AbstractContextManager[object]:
    """Return a context for the forward and backward of one micro-batch.

    Gradients are summed over processes at its end if `enabled`, and otherwise with those of a later micro-batch.
    """
    if isinstance(task.student, FSDPModule):
        task.student.set_requires_gradient_sync(enabled)
    if isinstance(module, DistributedDataParallel) and not enabled:
        return module.no_sync()
    return nullcontext()


def reshard(model: nn.Module) -> None:
    """Free the gathered parameters of a model that FSDP2 shards, so that `parameters()` returns the shards again.

    A forward without a backward leaves the outermost module's parameters gathered. Other models stay as they are.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def full_tensor(x: Tensor) -> Tensor:
    """Return a sharded tensor as a plain one, combined over processes; others as they are."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x
