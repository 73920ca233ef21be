"""Attention with grouped heads, over the text itself or over the video."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from reference.models.vamba.config import VambaConfig
from reference.models.vamba.rotary import rotate
from reference.ops.dtypes import accumulation_dtype

KeysAndValues = tuple[Tensor, Tensor]
Angles = tuple[Tensor, Tensor]


class Attention(nn.Module):
    """The four products of an attention; `self_attn` and `cross_attn` of a layer have the same parameters.

    q_proj, k_proj and v_proj have a bias, o_proj has none. num_attention_heads / num_key_value_heads queries share a key head.
    """

    def __init__(self, config: VambaConfig) -> None:
        super().__init__()
        D, C = config.hidden_size, config.channels
        self.heads, self.key_heads = config.num_attention_heads, config.num_key_value_heads
        self.q_proj = nn.Linear(D, self.heads * C)
        self.k_proj = nn.Linear(D, self.key_heads * C)
        self.v_proj = nn.Linear(D, self.key_heads * C)
        self.o_proj = nn.Linear(self.heads * C, D, bias=False)

    def project_keys(self, x: Float[Tensor, "B L D"], angles: Angles | None) -> KeysAndValues:
        """Return keys and values (B, key heads, L, C) of tokens, keys rotated if there are angles."""
        k, v = (split_heads(project(x), self.key_heads) for project in (self.k_proj, self.v_proj))
        return (k if angles is None else rotate(k, angles)), v

    def forward(
        self,
        x: Float[Tensor, "B L D"],
        keys_and_values: KeysAndValues,
        angles: Angles | None,
        allowed: Bool[Tensor, "B L M"] | None,
    ) -> Float[Tensor, "B L D"]:
        """Return what the tokens x read from M keys and values; `allowed` says which keys each may read, None all of them."""
        q = split_heads(self.q_proj(x), self.heads)
        if angles is not None:
            q = rotate(q, angles)
        return self.o_proj(attend(q, *keys_and_values, allowed).transpose(1, 2).flatten(2))


def split_heads(x: Float[Tensor, "B L E"], heads: int) -> Float[Tensor, "B H L C"]:
    """Return the channels of x as heads."""
    return x.unflatten(2, (heads, -1)).transpose(1, 2)


def attend(
    q: Float[Tensor, "B H L C"],
    k: Float[Tensor, "B G M C"],
    v: Float[Tensor, "B G M C"],
    allowed: Bool[Tensor, "B L M"] | None,
) -> Float[Tensor, "B H L C"]:
    """Return softmax(q k^T / sqrt(C)) v in q's dtype; head h reads group h // (H/G). A query that may read no key gets 0."""
    precise = accumulation_dtype(q.dtype)
    with torch.autocast(q.device.type, enabled=False):
        qg = q.to(precise).unflatten(1, (k.shape[1], -1))  # (B, G, H/G, L, C)
        kg, vg = k.to(precise)[:, :, None], v.to(precise)[:, :, None]
        scores = qg @ kg.transpose(-1, -2) / q.shape[-1] ** 0.5
        if allowed is None:
            allowed = torch.ones(scores.shape[0], *scores.shape[-2:], dtype=torch.bool, device=q.device)
        mask = allowed[:, None, None]
        readable = mask.any(-1, keepdim=True)
        weights = scores.masked_fill(~mask & readable, -torch.inf).softmax(-1) * readable
        return (weights @ vg).flatten(1, 2).to(q.dtype)
