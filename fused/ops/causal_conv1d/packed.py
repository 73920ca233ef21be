"""The causal convolution of rows into which several sequences are packed, in PyTorch operations, for any device."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from fused.runtime.autocast import no_autocast
from fused.runtime.dtypes import accumulation_dtype


def causal_conv1d_packed(
    x: Float[Tensor, "B L E"],
    weight: Float[Tensor, "E K"],
    bias: Float[Tensor, " E"] | None = None,
    *,
    seq_idx: Int[Tensor, "B L"],
    activation: str | None = "silu",
    initial_state: Float[Tensor, "B E S"] | None = None,
    reverse: bool = False,
) -> tuple[Float[Tensor, "B L E"], Float[Tensor, "B E S"]]:
    """Convolve as `fused.causal_conv1d` says, by one masked multiply-add for each weight; no argument is checked."""
    length, K = x.shape[1], weight.shape[1]
    dtype = accumulation_dtype(x.dtype)
    with no_autocast(x.device):
        if initial_state is None:
            edge = x.new_zeros(x.shape[0], K - 1, x.shape[2])
        else:
            edge = initial_state.transpose(1, 2).to(x.dtype)
        first, last = (seq_idx[:, -1:], seq_idx[:, :1]) if reverse else (seq_idx[:, :1], seq_idx[:, -1:])
        outside = first.expand(-1, K - 1)
        padded = torch.cat((x, edge) if reverse else (edge, x), dim=1)
        ids = torch.cat((seq_idx, outside) if reverse else (outside, seq_idx), dim=1)
        after = slice(None, K - 1) if reverse else slice(length, None)
        state = padded[:, after].masked_fill((ids[:, after] != last)[..., None], 0)
        y = torch.zeros(x.shape, dtype=dtype, device=x.device) if bias is None else bias.to(dtype).expand(x.shape)
        for k in range(K):
            window = slice(K - 1 - k, K - 1 - k + length) if reverse else slice(k, k + length)
            inputs = padded[:, window].masked_fill((ids[:, window] != seq_idx)[..., None], 0)
            y = torch.addcmul(y, inputs.to(dtype), weight[:, k].to(dtype))
        y = y if activation is None else F.silu(y)
        return y.to(x.dtype), state.transpose(1, 2).contiguous()
