"""The paper's scan orders (section 3.2, figure 4): in which sequence a mixer walks the tokens of a clip.

Tokens are stored frame after frame behind CLS: token 1 + f*P + p is patch p of frame f. The temporal walk takes all
frames of patch 0, then all of patch 1, and so on. CLS is token 0 in every order.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

SCAN_ORDERS = ("spatial", "temporal", "alternating", "both")


class Order(NamedTuple):
    """A walk and its way back: indices (1, L), or (B, V) where every clip has its own visible tokens."""

    ahead: Tensor
    back: Tensor


def orders_of_layer(scan_order: str, layer: int) -> tuple[str, ...]:
    """The walks of one layer's mixer, whose outputs are added: one, or with "both" two that share the weights.

    "alternating" starts spatial and changes with every layer.
    """
    match scan_order:
        case "alternating":
            return (("spatial", "temporal")[layer % 2],)
        case "both":
            return ("spatial", "temporal")
    return (scan_order,)


def temporal_order(frames: int, patches: int, kept: Tensor | None = None, device: torch.device | None = None) -> Order:
    """The temporal walk over all tokens, or over the `kept` ones (B, V): ascending indices of stored tokens, CLS first.

    With `kept`, the walk counts visible tokens only: it is that of the visible tokens.
    """
    # tensors made while exporting are no tensors afterwards
    make = _make_order if torch.compiler.is_exporting() else _whole_order
    whole = make(frames, patches, device if kept is None else kept.device)
    if kept is None:
        return whole
    ahead = whole.back[0][kept].argsort(dim=1)
    return Order(ahead, ahead.argsort(dim=1))


def permute(tokens: Tensor, order: Order) -> Tensor:
    """Tokens (B, L, D) in the sequence of the walk."""
    return _Permutation.apply(tokens, *order)


def restore(tokens: Tensor, order: Order) -> Tensor:
    """The inverse of `permute`."""
    return _Permutation.apply(tokens, order.back, order.ahead)


class _Permutation(torch.autograd.Function):
    """Its gradient is the inverse permutation: a copy like the forward, where indexing alone would scatter and add."""

    @staticmethod
    def forward(tokens: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        clips = torch.arange(tokens.shape[0], device=tokens.device)[:, None]
        return tokens[clips, index]

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        _, index, inverse = inputs
        ctx.save_for_backward(index, inverse)

    @staticmethod
    def backward(ctx, grad):
        index, inverse = ctx.saved_tensors
        return _Permutation.apply(grad, inverse, index), None, None


@lru_cache(maxsize=16)  # the same few for the life of a model; computed anew they would cost a sort per forward
@torch.inference_mode(False)  # a tensor made in inference mode could not be used in training later
def _whole_order(frames: int, patches: int, device: torch.device | None) -> Order:
    return _make_order(frames, patches, device)


def _make_order(frames: int, patches: int, device: torch.device | None) -> Order:
    cls = torch.zeros(1, 1, dtype=torch.long, device=device)
    stored = torch.arange(1, 1 + frames * patches, device=device)
    ahead = stored.view(frames, patches).T.reshape(1, -1)
    back = stored.view(patches, frames).T.reshape(1, -1)
    return Order(torch.cat((cls, ahead), dim=1), torch.cat((cls, back), dim=1))
