"""The scan orders of the VideoMamba paper (section 3.2, figure 4) as permutations of the token sequence.

A clip of T frames with P patches each is stored spatial-first: token 0 is CLS, token 1 + f*P + p is patch p of frame f.
An order says in which sequence a mixer walks these tokens; CLS stays token 0 in all of them.
"""

import torch
from torch import Tensor

SCAN_ORDERS = ("spatial", "temporal", "alternating", "both")


def orders_of_layer(scan_order: str, layer: int) -> tuple[str, ...]:
    """The orders in which one layer's mixer walks the tokens; the outputs of two orders are summed.

    "spatial" and "temporal" are the same in every layer, "alternating" starts spatial and changes every layer, "both" is the
    paper's spatiotemporal scan with all four scans, the mixer's weights serving both orders.
    """
    if scan_order == "alternating":
        return ("temporal",) if layer % 2 else ("spatial",)
    return ("spatial", "temporal") if scan_order == "both" else (scan_order,)


def temporal_rank(frames: int, patches: int, device: torch.device | None = None) -> Tensor:
    """Rank (1 + T*P,) of each stored token in the temporal-first walk: patch p of frame f comes at 1 + p*T + f."""
    rank = 1 + torch.arange(frames * patches, device=device).view(patches, frames).T.reshape(-1)
    return torch.cat((rank.new_zeros(1), rank))


def temporal_order(frames: int, patches: int, visible: Tensor | None = None, device: torch.device | None = None) -> Tensor:
    """Indices (1, L), or (B, V) with a mask, of the stored tokens in temporal-first sequence.

    `visible` (B, L) bool marks the tokens that a mask has left, the same number V in every clip: the walk is then that of the
    visible tokens, and the indices count visible tokens only.
    """
    rank = temporal_rank(frames, patches, device)[None]
    if visible is not None:
        rank = rank.expand_as(visible)[visible].view(visible.shape[0], -1)
    return rank.argsort(dim=1)


def walk(tokens: Tensor, order: Tensor) -> Tensor:
    """Tokens (B, L, D) in the sequence of order (1 or B, L)."""
    return tokens.gather(1, order[..., None].expand_as(tokens))


def undo(tokens: Tensor, order: Tensor) -> Tensor:
    """The inverse of `walk`."""
    return walk(tokens, order.argsort(dim=1))
