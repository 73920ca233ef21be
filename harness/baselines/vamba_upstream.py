"""Vamba the way upstream runs it, on the kernels of `fused`: keys of grouped heads are copied for every head, at every call,
masks are dense, the video is not cut, and the mixer of the last layer runs."""

import torch
import torch.nn.functional as F
from torch import Tensor

import fused
from fused.models.vamba.attention import Attention, split_heads
from fused.models.vamba.cache import LayerMemory, Pair
from fused.models.vamba.layer import Shared
from fused.models.vamba.pattern import Pattern
from fused.models.vamba.rotary import Angles, rotate


class RepeatingAttention(Attention):
    """An attention that repeats keys and values for every head before PyTorch's kernels."""

    def forward(self, x: Tensor, pair: Pair, angles: Angles | None, pattern: Pattern, backend: str) -> Tensor:
        """Return what the tokens x (B, L, D) read from keys and values."""
        q = split_heads(self.q_proj(x), self.heads)
        q = q if angles is None else rotate(q, angles, backend)
        k, v = (t.repeat_interleave(self.heads // self.key_heads, dim=1) for t in pair)
        if not k.shape[2]:
            return self.o_proj(torch.zeros_like(q).transpose(1, 2).flatten(2))
        mask = dense(pattern, q.shape[0], q.shape[2], k.shape[2], q.device)
        causal = pattern.causal and mask is None and q.shape[2] > 1
        return self.o_proj(F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal).transpose(1, 2).flatten(2))


def dense(pattern: Pattern, rows: int, queries: int, keys: int, device: torch.device) -> Tensor | None:
    """Return the pattern as a mask (B, 1, L, M) or (B, 1, 1, M), None where it has neither spans nor a mask."""
    if pattern.spans is None:
        return pattern.mask
    mask = torch.zeros(rows, 1, queries, keys, dtype=torch.bool, device=device)
    for row, q, k in pattern.spans:
        block = torch.ones(q.stop - q.start, k.stop - k.start, dtype=torch.bool, device=device)
        mask[row, 0, q, k] = block.tril() if pattern.causal else block
    return mask


class UpstreamVamba(fused.Vamba):
    """Vamba with these attentions, and with the mixer that has no effect."""

    def __init__(self, config: fused.VambaConfig, backend: str = "auto") -> None:
        super().__init__(config, backend)
        for module in self.modules():
            if type(module) is Attention:
                module.__class__ = RepeatingAttention

    def run_layers(
        self, text: Tensor, video: Tensor | None, shared: Shared, memories: list[LayerMemory], recompute: bool
    ) -> Tensor:
        for layer, memory in zip(self.model.layers, memories, strict=True):
            text, video = layer(text, video, shared=shared, memory=memory)
        return text
