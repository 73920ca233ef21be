"""The scan orders of the VideoMamba paper (section 3.2, figure 4): the order in which a mixer scans the tokens of a clip.

Tokens are stored frame after frame, after CLS: token 1 + f*P + p is patch p of frame f. This is the spatial order. The
temporal order takes all frames of patch 0, then all of patch 1, and so on. CLS is token 0 in every order.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused.runtime.exporting import is_exporting

SCAN_ORDERS = ("spatial", "temporal", "alternating", "both")


class Order(NamedTuple):
    """A permutation of tokens and its inverse: indices (1, L), or (B, V) if every clip has its own visible tokens."""

    permutation: Tensor
    inverse: Tensor


def orders_of_layer(scan_order: str, layer: int) -> tuple[str, ...]:
    """Return the orders in which one layer's mixer scans: one, or two for "both", whose outputs are added.

    "alternating" is spatial for layers 0, 2, 4, ... and temporal for the others.
    """
    match scan_order:
        case "alternating":
            return (("spatial", "temporal")[layer % 2],)
        case "both":
            return ("spatial", "temporal")
    return (scan_order,)


def temporal_order(frames: int, patches: int, visible: Tensor | None = None, device: torch.device | None = None) -> Order:
    """Return the temporal order of all 1 + frames * patches tokens, or of the `visible` ones.

    `visible` (B, V) holds ascending indices of stored tokens, CLS first. The order's indices then count visible tokens only.
    """
    # a tensor that is created during an export belongs to the exported program and must not be cached
    make = _make_order if is_exporting() else _cached_order
    order = make(frames, patches, device if visible is None else visible.device)
    if visible is None:
        return order
    permutation = order.inverse[0][visible].argsort(dim=1)
    return Order(permutation, permutation.argsort(dim=1))


def permute(tokens: Tensor, order: Order) -> Tensor:
    """Return tokens (B, L, D) in the given order."""
    return _Permutation.apply(tokens, *order)


def restore(tokens: Tensor, order: Order) -> Tensor:
    """Return tokens (B, L, D) of the given order in storage order: the inverse of `permute`."""
    return _Permutation.apply(tokens, order.inverse, order.permutation)


class _Permutation(torch.autograd.Function):
    """The indexing tokens[:, index] by a permutation; its gradient is a copy, not the scatter-add of PyTorch's indexing."""

    @staticmethod
    def forward(tokens: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        """Return tokens (B, L, D) in the order of `index` (1 or B, L); `inverse` is used by the backward pass only."""
        clips = torch.arange(tokens.shape[0], device=tokens.device)[:, None]
        return tokens[clips, index]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, index, inverse = inputs
        ctx.save_for_backward(index, inverse)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        index, inverse = ctx.saved_tensors
        return _Permutation.apply(grad, inverse, index), None, None


@lru_cache(maxsize=16)  # a model uses a few orders; to make one in every forward costs kernel launches
@torch.inference_mode(False)  # a tensor made in inference mode could not be used in training later
def _cached_order(frames: int, patches: int, device: torch.device | None) -> Order:
    """Return `_make_order` from a cache."""
    return _make_order(frames, patches, device)


def _make_order(frames: int, patches: int, device: torch.device | None) -> Order:
    """Return the temporal order of all tokens as indices (1, 1 + frames * patches)."""
    cls = torch.zeros(1, 1, dtype=torch.long, device=device)
    stored = torch.arange(1, 1 + frames * patches, device=device)
    permutation = stored.view(frames, patches).T.reshape(1, -1)
    inverse = stored.view(patches, frames).T.reshape(1, -1)
    return Order(torch.cat((cls, permutation), dim=1), torch.cat((cls, inverse), dim=1))
