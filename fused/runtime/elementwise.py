"""Elementwise functions whose bits do not depend on the other clips of the batch.

PyTorch's CPU kernels of softplus, sigmoid, silu and exp2 compute the last few elements of a vector loop in scalars, whose last
bit differs (measured in PyTorch 2.13: half of the draws; exp, multiply-add and sums show none). Where a loop ends depends on
the size of the whole tensor.
"""

import functools
from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

VECTORS = 64
"""Elements of which the widest vector loop takes a whole number of turns."""
SHARE = 2**15
"""Elements that PyTorch gives a thread at least."""


def clipwise(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """Return function(*tensors), clip by clip along the first axis where that decides the bits."""
    if tensors[0].device.type != "cpu" or tensors[0].shape[0] < 2:
        return function(*tensors)
    return torch.stack([function(*clip) for clip in zip(*tensors, strict=True)])


def by_vectors(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """Return function(*tensors) for tensors of `empty_vectors`, all of one shape: no element is computed in scalars.

    `function` takes and returns tensors of any shape. A compiler's code has vector loops of its own.
    """
    if torch.compiler.is_compiling():
        return function(*tensors)
    first = tensors[0]
    elements = first.numel()
    size = (whole_vectors(elements),)
    if size == (elements,):
        return function(*tensors)
    return function(*(x.as_strided(size, (1,)) for x in tensors)).as_strided(first.shape, first.stride())


def silu_in_place(x: Tensor) -> Tensor:
    """Return x, overwritten by silu(x), for a tensor of `empty_vectors`; within a compiler, silu(x)."""
    if torch.compiler.is_compiling():
        return F.silu(x)
    by_vectors(functools.partial(F.silu, inplace=True), x)
    return x


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return x in a dtype, x itself if it has it: PyTorch 2.11's compiler loses gradients behind a `to` that does nothing."""
    return x if x.dtype == dtype else x.to(dtype)


def empty_vectors(shape: Sequence[int], **options: Any) -> Tensor:
    """Return a contiguous tensor without values, with memory behind it up to a whole number of vectors."""
    if torch.compiler.is_compiling():
        return torch.empty(shape, **options)
    size = prod(shape)
    whole = whole_vectors(size)
    return torch.empty(shape, **options) if whole == size else torch.empty(whole, **options)[:size].view(tuple(shape))


def whole_vectors(elements: int) -> int:
    """Return the least size of a contiguous tensor, `elements` or more, of which every thread of a CPU takes whole vectors."""
    threads = min(torch.get_num_threads(), -(-elements // SHARE)) if elements > SHARE else 1
    return -(-elements // (VECTORS * threads)) * VECTORS * threads
