"""The exponential moving average (EMA) of a model's parameters, which often answers better than the last step's.

    average <- rate * average + (1 - rate) * parameter    after each step; it begins as the initial parameters
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from fused.train.parallel import reshard


class WeightAverage:
    """The EMA of all parameters of a model, at a rate in (0, 1).

    The averages are copies of the parameters, with their dtype (float32 in a training), device and sharding: of a model that
    FSDP2 shards, every process averages its own shards. A VideoMamba has no buffers to be averaged.
    """

    def __init__(self, model: nn.Module, rate: float) -> None:
        self._model = model
        self._parameters = dict(model.named_parameters())
        self.tensors = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}  # by name
        self._average = get_ema_multi_avg_fn(rate)

    @torch.no_grad()
    def update(self) -> None:
        """Take the current parameters into the averages."""
        pairs = self._local_pairs()
        self._average([average for _, average in pairs], [parameter for parameter, _ in pairs], 0)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Give the model the averages as its parameters for the time of the block, without another copy of all of them."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        """Exchange parameters and averages, in place."""
        reshard(self._model)  # gathered parameters are copies of the shards
        for parameter, average in self._local_pairs():
            kept = parameter.clone()
            parameter.copy_(average)
            average.copy_(kept)

    def _local_pairs(self) -> list[tuple[Tensor, Tensor]]:
        """Return each parameter and its average, of sharded ones this process's shards."""
        return [(_local(parameter), _local(self.tensors[name])) for name, parameter in self._parameters.items()]


def _local(x: Tensor) -> Tensor:
    """Return this process's shard of a sharded tensor, which shares its memory; others as they are."""
    return x.to_local() if isinstance(x, DTensor) else x.detach()
