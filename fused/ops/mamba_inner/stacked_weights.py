"""The weights of both directions in one tensor each, so that an operation takes both."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

DIRECTIONS = 2


class StackedWeights(NamedTuple):
    """The weights of K = 2 directions, or their gradients, shaped for tokens (T, K, b, E); the convolution has width W."""

    conv: Tensor  # (W, K, 1, E)
    conv_bias: Tensor | None  # (K, 1, E)
    x_proj: Tensor  # (K, R+2N, E)
    dt_proj: Tensor  # (K, E, R)
    dt_bias: Tensor  # (K, 1, E)
    A: Tensor  # (K, 1, 1, N, E)
    D: Tensor  # (K, 1, E)

    def add_(self, other: "StackedWeights") -> "StackedWeights":
        """Add to every tensor in place and return self."""
        for x, y in zip(self, other, strict=True):
            if x is not None and y is not None:
                x += y
        return self


def stack(weights: Sequence[Any]) -> StackedWeights:
    """Stack weights in the order of `DirectionWeights`, each of the forward direction before that of the backward one."""
    conv, conv_bias, x_proj, dt_proj, dt_bias, A_log, D = (list(weights[i : i + 2]) for i in range(0, len(weights), 2))
    vectors = [*dt_bias, *D, *(b for b in conv_bias if b is not None)]
    dt_biases, Ds, *conv_biases = torch.stack(vectors).view(-1, DIRECTIONS, 1, len(vectors[0])).unbind()
    return StackedWeights(
        torch.stack([w.t() for w in conv], 1).unsqueeze(2),
        conv_biases[0] if conv_biases else None,
        torch.stack(x_proj),
        torch.stack(dt_proj),
        dt_biases,
        torch.stack([w.t() for w in A_log]).exp_().neg_()[:, None, None],
        Ds,
    )


def unstack(weights: StackedWeights, grads: StackedWeights | None) -> Iterator[Tensor | None]:
    """Yield the gradients of the weights in the order that `stack` takes; without `grads`, zeros.

    That of A_log is A times that of A.
    """
    if grads is None:
        zeros: Any = (None if w is None else torch.zeros_like(w) for w in weights)
        grads = StackedWeights(*zeros)
    bias: Any = (None, None) if grads.conv_bias is None else grads.conv_bias[:, 0]
    conv, A_log = grads.conv[:, :, 0].permute(1, 2, 0), grads.A.mul(weights.A)[:, 0, 0].mT
    for pair in (conv, bias, grads.x_proj, grads.dt_proj, grads.dt_bias[:, 0], A_log, grads.D[:, 0]):
        yield from pair
