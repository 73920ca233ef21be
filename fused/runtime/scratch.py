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
    """Contiguous tensors by name, each with memory behind it up to a whole number of vectors.

    The next call of the same thread that asks for a name overwrites its tensor.
    """

    def __init__(self, like: Tensor) -> None:
        """Make tensors of the dtype and device of `like`, on a CPU in memory that stays with the thread."""
        self.like = like
        keep = type(like) is Tensor and like.device.type == "cpu"
        self.memory: dict[str, _Memory] = _kept.__dict__.setdefault(str(like.dtype), {}) if keep else {}

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Return the tensor of a name in this shape, with whatever values it had."""
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
                memory.steps.clear()
            memory.views[key] = memory.flat[: prod(shape)].view(shape)
        return memory.views[key]

    def tensor_and_steps(self, name: str, shape: tuple[int, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the tensor of a name in this shape, and its views along the first axis."""
        x, steps = self.tensor(name, shape), self.memory[name].steps
        if shape not in steps:
            with torch.inference_mode(False):
                steps[shape] = x.unbind()
        return x, steps[shape]


class _Memory:
    """A flat tensor and views of it."""

    def __init__(self, flat: Tensor) -> None:
        self.flat = flat
        self.views: dict[tuple[int, ...], Tensor] = {}
        self.steps: dict[tuple[int, ...], tuple[Tensor, ...]] = {}
