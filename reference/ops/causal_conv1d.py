"""The short causal convolution before the scan: depthwise, over time, with zeros before the first token."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from reference.ops.dtypes import accumulation_dtype


def causal_conv1d(
    x: Float[Tensor, "B L E"],
    weight: Float[Tensor, "E K"],
    bias: Float[Tensor, " E"] | None = None,
    *,
    activation: str | None = "silu",
    initial_state: Float[Tensor, "B E S"] | None = None,
    reverse: bool = False,
    seq_idx: Int[Tensor, "B L"] | None = None,
) -> tuple[Float[Tensor, "B L E"], Float[Tensor, "B E S"]]:
    """Convolve every channel with its own K weights; the last weight multiplies the current token:

        y_t = act(bias + sum_w weight[:, w] x_{t-(K-1-w)})        reverse: x_{t+(K-1-w)}

    The initial state holds the K-1 raw inputs before token 0, or with `reverse=True` those after token L-1. It is in time order
    in both directions, and zero by default. The final state is the initial state of the call that continues the sequence: the
    last K-1 raw inputs, or in reverse the first. Where L < K-1 it still holds inputs of the initial state. All arithmetic is in
    at least float32. Upstream: causal-conv1d's `causal_conv1d_fn`, here channel-last.

    `seq_idx` numbers the segments of each row: inputs of another segment than the token's count as zero. The initial state
    continues the first segment of each row (reverse: the last), and the final state has the inputs of the segment that it
    continues, zeros for those of others.

    Return y (B, L, E) in x's dtype and the final state (B, E, K-1) in x's dtype. Raise ValueError for an unknown activation.
    """
    if activation not in ("silu", "swish", None):
        raise ValueError(f"activation is {activation!r}; allowed are 'silu', 'swish' (the same) and None")
    L, K = x.shape[1], weight.shape[1]
    if initial_state is None:
        initial_state = x.new_zeros(x.shape[0], x.shape[2], K - 1)
    before = initial_state.transpose(1, 2).to(x.dtype)
    padded = torch.cat((x, before) if reverse else (before, x), dim=1)  # (B, L+K-1, E)
    after = slice(None, K - 1) if reverse else slice(L, None)
    final_state = padded[:, after]
    if seq_idx is not None:
        first, last = (seq_idx[:, -1:], seq_idx[:, :1]) if reverse else (seq_idx[:, :1], seq_idx[:, -1:])
        edge = first.expand(-1, K - 1)
        ids = torch.cat((seq_idx, edge) if reverse else (edge, seq_idx), dim=1).unsqueeze(2)  # (B, L+K-1, 1)
        final_state = torch.where(ids[:, after] == last.unsqueeze(2), final_state, 0)
    final_state = final_state.transpose(1, 2).clone()  # a view would keep all of padded

    precise = accumulation_dtype(x.dtype)
    padded, weight = padded.to(precise), weight.to(precise)
    y = torch.zeros_like(x, dtype=precise) if bias is None else bias.to(precise).expand(x.shape)
    for w in range(K):
        start = K - 1 - w if reverse else w
        inputs = padded[:, start : start + L]
        if seq_idx is not None:
            inputs = torch.where(ids[:, start : start + L] == seq_idx.unsqueeze(2), inputs, 0)
        y = y + weight[:, w] * inputs
    if activation is not None:
        y = F.silu(y)
    return y.to(x.dtype), final_state
