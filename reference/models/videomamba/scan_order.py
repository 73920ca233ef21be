"""The scan orders of the VideoMamba paper (section 3.2, figure 4) as permutations of the token sequence.

A clip of T frames with P patches each is stored spatial-first: token 0 is CLS, token 1 + f*P + p is patch p of frame f.
A scan order is the order in which a mixer reads these tokens. CLS is token 0 in all of them.
"""

import torch
from torch import Tensor

SCAN_ORDERS = ("spatial", "temporal", "alternating", "both")


def orders_of_layer(scan_order: str, layer: int) -> tuple[str, ...]:
    """Return the orders, "spatial" or "temporal", in which the mixer of one layer reads the tokens.

    "spatial" and "temporal" are the same in every layer. "alternating" is spatial in even layers and temporal in odd ones.
    "both" is the paper's spatiotemporal scan: the mixer runs in both orders with the same weights, and the outputs are added.
    """
    if scan_order == "alternating":
        return ("temporal",) if layer % 2 else ("spatial",)
    return ("spatial", "temporal") if scan_order == "both" else (scan_order,)


def temporal_rank(frames: int, patches: int, device: torch.device | None = None) -> Tensor:
    """Return the position (1 + T*P,) int64 of each stored token in temporal order: patch p of frame f is at 1 + p*T + f."""
    rank = 1 + torch.arange(frames * patches, device=device).view(patches, frames).T.reshape(-1)
    return torch.cat((rank.new_zeros(1), rank))


def temporal_order(frames: int, patches: int, visible: Tensor | None = None, device: torch.device | None = None) -> Tensor:
    """Return the indices (1, L) int64 of the stored tokens in temporal order.

    `visible` (B, L) bool marks the tokens that a mask leaves, the same number V in every clip. The result is then the order
    (B, V) of the visible tokens, and its indices count visible tokens only.
    """
    rank = temporal_rank(frames, patches, device)[None]
    if visible is not None:
        rank = rank.expand_as(visible)[visible].view(visible.shape[0], -1)
    return rank.argsort(dim=1)


def permute(tokens: Tensor, order: Tensor) -> Tensor:
    """Return tokens (B, L, D) reordered by the indices `order` (1 or B, L)."""
    return tokens.gather(1, order[..., None].expand_as(tokens))


def restore(tokens: Tensor, order: Tensor) -> Tensor:
    """Return tokens (B, L, D) in storage order: the inverse of `permute` with the same `order`."""
    return permute(tokens, order.argsort(dim=1))
