"""One process or several, with PyTorch's own means: torchrun's environment, collectives, FSDP2.

torchrun --nproc-per-node 8 -m fused.train --config FILE.yaml parallel=fsdp
"""

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from fused.train.tasks import Task

BUCKET_BYTES = 64 * 2**20  # of gradients in one collective


class PendingSum:
    """Sums over all processes that may still be under way on a GPU."""

    def __init__(self, total: Tensor) -> None:
        """Begin to copy `total`, float64 (N,), to the host."""
        self._done: torch.cuda.Event | None = None
        self._total = total
        if total.is_cuda:
            self._total = torch.empty(total.shape, dtype=total.dtype, pin_memory=True).copy_(total, non_blocking=True)
            self._done = torch.cuda.Event()
            self._done.record()

    def result(self) -> list[float]:
        """Wait for the sums, and return them."""
        if self._done is not None:
            self._done.synchronize()
        return self._total.tolist()


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
        return self.start_sum(torch.stack(numbers)).result()

    def start_sum(self, values: Tensor, numbers: Sequence[float] = ()) -> PendingSum:
        """Begin to sum the values, float64 (N,) on the device, and then the numbers of the host, over all processes.

        It takes one collective, and does not wait for the GPU.
        """
        total = values.clone()
        if numbers:
            ours = torch.tensor(numbers, dtype=torch.float64)
            pinned = ours.pin_memory() if self.device.type == "cuda" else ours
            total = torch.cat((values, pinned.to(self.device, non_blocking=True)))
        if self.has_group:
            dist.all_reduce(total)
        return PendingSum(total)

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


def choose_device(device: str) -> torch.device:
    """Return the device for "cpu", "cuda" or "auto", which is a GPU if there is one.

    Raises ValueError for "cuda" where there is no GPU.
    """
    cuda = torch.cuda.is_available() if device == "auto" else device == "cuda"
    if cuda and not torch.cuda.is_available():
        raise ValueError("device is 'cuda'; allowed here, where PyTorch finds no GPU: 'auto' or 'cpu'")
    return torch.device("cuda" if cuda else "cpu")


@contextmanager
def joined_world(device: str = "auto") -> Iterator[World]:
    """Join the process group of torchrun's environment, and leave it when the block ends; without torchrun there is none.

    `device` and errors are those of `choose_device`. GPUs use NCCL, CPUs gloo.
    """
    chosen = choose_device(device)
    if "RANK" not in os.environ:
        yield World(chosen)
        return
    cuda = chosen.type == "cuda"
    local_device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else chosen
    if cuda:
        torch.cuda.set_device(local_device)
    dist.init_process_group("nccl" if cuda else "gloo", device_id=local_device if cuda else None)
    try:
        yield World(local_device, dist.get_rank(), dist.get_world_size(), True)
    finally:
        dist.destroy_process_group()


def parallelize(task: Task, parallel: str, world: World) -> None:
    """Make the parameters of all processes the same, or shard them by FSDP2.

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
        for block in task.blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(task.student, mesh=mesh, mp_policy=policy)
        if world.device.type == "cpu":  # gloo takes a mean for a sum in PyTorch 2.8
            for module in task.student.modules():
                if isinstance(module, FSDPModule):
                    module.set_force_sum_reduction_for_comms(True)
    task.load_weights(world.device)
    if parallel != "fsdp" and world.size > 1:
        for tensor in (*task.student.parameters(), *task.student.buffers()):
            dist.broadcast(tensor.detach(), src=0)


def set_gradient_sync(task: Task, last: bool) -> None:
    """Let FSDP2 average gradients over processes in the next backward if it is the `last` of a step.

    Without FSDP2 this is left to `average_gradients`.
    """
    if isinstance(task.student, FSDPModule):
        task.student.set_requires_gradient_sync(last)


def average_gradients(task: Task, world: World) -> None:
    """Replace the gradients of a step by their means over all processes, in place; FSDP2 has done so already.

    It is called between the backward and the optimiser, of eager steps and of graphs alike. DistributedDataParallel is not
    used: its collectives are within the backward, and in a graph they would need its hooks and NCCL to be captured, after 11
    steps for its buckets to settle. With other buckets NCCL may add up in another order, so eager steps do the same as graphs.
    The cost is that the collectives do not overlap with the backward; these models have 28 to 300 MB of gradients.
    """
    if world.size == 1 or isinstance(task.student, FSDPModule):
        return
    gradients = [p.grad for p in task.student.parameters() if p.grad is not None]  # the same ones in every process
    works = []
    for bucket in _buckets(gradients):
        flat = torch.cat([x.reshape(-1) for x in bucket]).div_(world.size)
        works.append((bucket, flat, dist.all_reduce(flat, async_op=True)))
    for bucket, flat, work in works:
        assert work is not None
        work.wait()
        parts = flat.split([x.numel() for x in bucket])
        torch._foreach_copy_(bucket, [part.view_as(x) for part, x in zip(parts, bucket, strict=True)])


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Yield tensors of one dtype in groups of up to BUCKET_BYTES, or of a single one, in order."""
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if bucket and (tensor.dtype != bucket[0].dtype or size + tensor.nbytes > BUCKET_BYTES):
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.nbytes
    if bucket:
        yield bucket


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
