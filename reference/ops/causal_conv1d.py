"""The short causal convolution that feeds the scan: depthwise, over time, zero before the start."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
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
) -> tuple[Float[Tensor, "B L E"], Float[Tensor, "B E S"]]:
    """Convolve every channel with its own K taps; the last tap meets the current token:

        y_t = act(bias + sum_w weight[:, w] x_{t-(K-1-w)})        reverse: x_{t+(K-1-w)}

    The state holds the K-1 raw inputs next to the sequence, in time order whatever the direction, in x's dtype: those
    before token 0, or with `reverse=True` those after token L-1. It is zero where none came. The final state is what a
    following call needs: the last K-1 inputs seen, or in reverse the first (earlier state included where L < K-1).
    All arithmetic is in at least float32 (causal-conv1d's `causal_conv1d_fn`, channel-last).

    Returns y (B, L, E) in x's dtype and the final state (B, E, K-1); raises ValueError for an unknown activation.
    """
    if activation not in ("silu", "swish", None):
        raise ValueError(f"activation is {activation!r}; allowed are 'silu', 'swish' (the same) and None")
    L, K = x.shape[1], weight.shape[1]
    if initial_state is None:
        initial_state = x.new_zeros(x.shape[0], x.shape[2], K - 1)
    edge = initial_state.transpose(1, 2).to(x.dtype)
    line = torch.cat((x, edge) if reverse else (edge, x), dim=1)
    final_state = (line[:, : K - 1] if reverse else line[:, L:]).transpose(1, 2).clone()  # or the state would keep all of line

    precise = accumulation_dtype(x.dtype)
    line, taps = line.to(precise), weight.to(precise)
    y = torch.zeros_like(x, dtype=precise) if bias is None else bias.to(precise).expand(x.shape)
    for w in range(K):
        first = K - 1 - w if reverse else w
        y = y + taps[:, w] * line[:, first : first + L]
    if activation is not None:
        y = F.silu(y)
    return y.to(x.dtype), final_state
