"""Memory of the CPU that a thread uses in every call again.

A new tensor lies at an address that no cache holds, and is written there six times as slowly as where the last one was.
"""

import threading
from math import prod

import torch
from torch import Tensor

from fused.runtime.elementwise import whole_vectors

SHAPES = 16
"""Shapes of a tensor whose views are kept: making them takes as long as the start of an operation each."""
_kept = threading.local()


class Scratch:
    """Contiguous tensors by name, each with memory behind it up to a whole number of vectors."""

    def __init__(self, like: Tensor, keep: bool = True) -> None:
        """Make tensors of the dtype and device of `like`; with `keep`, on a CPU, in memory that stays with the thread.

        The next call of the thread that asks for the same name overwrites it.
        """
        self.like = like
        keep = keep and type(like) is Tensor and like.device.type == "cpu"
        self.memory: dict[str, _Memory] = _kept.__dict__.setdefault(str(like.dtype), {}) if keep else {}

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Return the tensor of a name in this shape, with whatever values it had."""
        return self.tensor_and_steps(name, shape)[0]

    def tensor_and_steps(self, name: str, shape: tuple[int, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the tensor of a name in this shape, and its views along the first axis."""
        key = torch.get_num_threads(), *shape
        memory = self.memory.get(name)
        if memory is not None and (found := memory.views.get(key)) is not None:
            return found
        with torch.inference_mode(False):
            size = whole_vectors(prod(shape))
            if memory is None or memory.flat.numel() < size:
                memory = self.memory[name] = _Memory(self.like.new_empty(size))
            if len(memory.views) == SHAPES:
                memory.views.clear()
            x = memory.flat[: prod(shape)].view(shape)
            memory.views[key] = x, x.unbind()
        return memory.views[key]


class _Memory:
    """A flat tensor and views of it."""

    def __init__(self, flat: Tensor) -> None:
        self.flat = flat
        self.views: dict[tuple[int, ...], tuple[Tensor, tuple[Tensor, ...]]] = {}
