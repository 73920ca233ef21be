"""A layer of the compressor: over the whole sequence, or for its queries alone."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fused import backends
from fused.models.bimba.attention import Attention
from fused.models.bimba.interleave import Places, extract, insert
from fused.models.bimba.query_mixer import mix_at_queries
from fused.modules.mamba import Mamba
from fused.modules.norm import Norm
from fused.runtime.library import wants_gradients

EPS = 1e-6


class CompressorLayer(nn.Module):
    """A mixer over the interleaved sequence, behind a norm and beside a residual connection, each of which can be off."""

    def __init__(self, d_model: int, mixer: Mamba | Attention, use_norm: bool, use_res: bool) -> None:
        super().__init__()
        self.norm = Norm(d_model, EPS) if use_norm else None
        self.mixer = mixer
        self.use_res = use_res

    def forward(
        self, tokens: Float[Tensor, "B T C"], queries: Float[Tensor, "B Q C"], places: Places, backend: str
    ) -> tuple[Tensor, Tensor]:
        """Return the new tokens (B, T, C) and queries (B, Q, C)."""
        sequence = insert(tokens, queries, places)
        normed = sequence if self.norm is None else self.norm(sequence, backend)
        mixed = self.mixer(normed, backend=backend) if isinstance(self.mixer, Mamba) else self.mixer(normed)
        return extract(sequence + mixed if self.use_res else mixed, places)

    def read(
        self, tokens: Float[Tensor, "B T C"], queries: Float[Tensor, "B Q C"], places: Places, backend: str
    ) -> Float[Tensor, "B Q C"]:
        """Return the new queries (B, Q, C) alone, for which less is to be computed."""
        sequence, readers = norm_and_insert(self.norm, tokens, queries, places, backend)
        if isinstance(self.mixer, Mamba):
            mixed = mix_at_queries(self.mixer, sequence, readers, places, backend)
        else:
            mixed = self.mixer(sequence, readers)
        return queries + mixed if self.use_res else mixed


def norm_and_insert(
    norm: Norm | None, tokens: Float[Tensor, "B T C"], queries: Float[Tensor, "B Q C"], places: Places, backend: str
) -> tuple[Tensor, Tensor]:
    """Return the normalised sequence (B, T + Q, C) and its queries (B, Q, C)."""
    if norm is None:
        return insert(tokens, queries, places), queries
    readers = norm(queries, backend) if queries.numel() else queries  # a chunk may have no query
    plain = type(norm) is Norm and not (norm._forward_hooks or norm._forward_pre_hooks)
    inference = not (torch.compiler.is_compiling() or wants_gradients(tokens, queries, norm.weight))
    if plain and inference and backends.operators_of(backend) == "native" and queries.numel() and tokens.numel():
        from fused.ops.add_norm.interleaved import interleaved_norm

        return interleaved_norm(tokens, queries, places.sources, norm.weight, norm.eps), readers
    normed = norm(tokens, backend) if tokens.numel() else tokens
    return insert(normed, readers, places), readers
