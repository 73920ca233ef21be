"""Elementwise functions whose bits do not depend on the other clips of the batch."""

from collections.abc import Callable

import torch
from torch import Tensor


def clipwise(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """Return function(*tensors), clip by clip along the first axis where that decides the bits.

    PyTorch's CPU kernels of softplus, sigmoid and silu compute the last few elements of a vector loop in scalars, whose
    last bit differs (measured in PyTorch 2.13: half of the draws; exp, multiply-add and sums show none), and where a
    loop ends depends on the size of the whole tensor.
    """
    if tensors[0].device.type != "cpu" or tensors[0].shape[0] < 2:
        return function(*tensors)
    return torch.stack([function(*clip) for clip in zip(*tensors, strict=True)])
