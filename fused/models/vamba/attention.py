"""Attention with grouped heads, over the text itself or over the video."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from fused import backends
from fused.models.vamba.cache import Pair
from fused.models.vamba.config import VambaConfig
from fused.models.vamba.pattern import Pattern
from fused.models.vamba.rotary import Angles, rotate
from fused.runtime.library import wants_gradients


class Attention(nn.Module):
    """The products of an attention; `self_attn` and `cross_attn` of a layer have the same parameters.

    q_proj, k_proj and v_proj have a bias, o_proj has none.
    """

    def __init__(self, config: VambaConfig) -> None:
        super().__init__()
        D, C = config.hidden_size, config.channels
        self.heads, self.key_heads = config.num_attention_heads, config.num_key_value_heads
        self.q_proj = nn.Linear(D, self.heads * C)
        self.k_proj = nn.Linear(D, self.key_heads * C)
        self.v_proj = nn.Linear(D, self.key_heads * C)
        self.o_proj = nn.Linear(self.heads * C, D, bias=False)

    def project_keys(self, x: Float[Tensor, "B L D"], angles: Angles | None, backend: str) -> Pair:
        """Return keys and values (B, key heads, L, C) of tokens, keys rotated if there are angles."""
        k, v = (split_heads(project(x), self.key_heads) for project in (self.k_proj, self.v_proj))
        return (k if angles is None else rotate(k, angles, backend)), v

    def forward(
        self, x: Float[Tensor, "B L D"], pair: Pair, angles: Angles | None, pattern: Pattern, backend: str
    ) -> Float[Tensor, "B L D"]:
        """Return what the tokens x read from keys and values, by the pattern; queries are rotated if there are angles."""
        q = split_heads(self.q_proj(x), self.heads)
        if angles is not None:
            q = rotate(q, angles, backend)
        k, v = (t.to(q.device, non_blocking=True) for t in pair)  # of a video in host memory
        return self.o_proj(attend(q, k, v, pattern, backend))


def split_heads(x: Float[Tensor, "B L E"], heads: int) -> Float[Tensor, "B H L C"]:
    """Return the channels of x as heads, a view."""
    return x.unflatten(2, (heads, -1)).transpose(1, 2)


def attend(
    q: Float[Tensor, "B H L C"], k: Float[Tensor, "B G M C"], v: Float[Tensor, "B G M C"], pattern: Pattern, backend: str
) -> Float[Tensor, "B L E"]:
    """Return softmax(q k^T / sqrt(C)) v as (B, L, H C); head h reads group h // (H/G).

    PyTorch's fused attention runs it, and on the native backend kernels of this project for few queries to many keys. Keys
    and values of grouped heads are never repeated in memory.
    """
    if pattern.spans is not None:
        out = q.new_zeros(q.shape[0], q.shape[2], q.shape[1] * q.shape[3])
        for row, queries, keys in pattern.spans:
            q_part, k_part, v_part = (t[row : row + 1, :, place] for t, place in ((q, queries), (k, keys), (v, keys)))
            run = _attend_causally if pattern.causal else _attend
            out[row : row + 1, queries] = run(q_part, k_part, v_part, backend)
        return out
    if pattern.mask is not None or not pattern.causal:
        return _attend(q, k, v, backend, pattern.mask)
    return _attend_causally(q, k, v, backend)


def _attend_causally(q: Tensor, k: Tensor, v: Tensor, backend: str) -> Tensor:
    """Return the attention (B, L, H C) of L queries to as many keys, none to later ones."""
    if q.shape[2] == 1:
        return _attend(q, k, v, backend)
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
    return out.transpose(1, 2).flatten(2)


def _attend(q: Tensor, k: Tensor, v: Tensor, backend: str, mask: Tensor | None = None) -> Tensor:
    """Return the attention (B, L, H C). The heads of a group are rows of queries, (B, G, H/G L, C), to one head of keys.

    In inference on a GPU in 16 bits PyTorch's kernel for grouped heads is taken, which splits many keys among programs: with
    heads as rows 4 heads of keys occupy few multiprocessors (H200, one query to 76,544 keys: 0.94 ms, the former 0.08 ms).
    """
    B, H, L, C = q.shape
    if not k.shape[2] or not L:
        return q.new_zeros(B, L, H * C)
    G = k.shape[1]
    rows = q.reshape(B, G, H // G * L, C)
    if mask is None and backends.operators_of(backend) == "native":
        from fused.ops.split_attention.native import split_attention, takes

        if takes(rows, k, v):
            return split_attention(rows, k, v).view(B, H, L, C).transpose(1, 2).flatten(2)
    if mask is None and q.is_cuda and q.dtype in (torch.bfloat16, torch.float16) and not wants_gradients(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=H != G).transpose(1, 2).flatten(2)
    readable = None
    if mask is not None:
        if mask.dtype == torch.bool:
            readable = mask.any(-1, keepdim=True)
            mask = mask | ~readable  # a row without keys would be 0/0, forward and backward
        mask = mask.repeat(1, 1, H // G, 1) if mask.shape[2] > 1 else mask
    out = F.scaled_dot_product_attention(rows, k, v, attn_mask=mask)
    out = out.reshape(B, H, L, C)  # on a GPU heads lie behind rows
    if readable is not None:
        out = out * readable
    return out.transpose(1, 2).flatten(2)
