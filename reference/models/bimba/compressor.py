"""The compressor of BIMBA: queries interleaved with video tokens, mixed by a bidirectional selective scan, and read out."""

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from reference.models.bimba.attention import Attention
from reference.models.bimba.interleave import interleave
from reference.modules.mamba import Mamba
from reference.modules.norm import Norm
from reference.ops.dtypes import accumulation_dtype

EPS = 1e-6


class CompressorLayer(nn.Module):
    """A mixer over the interleaved sequence, behind a norm and beside a residual connection, each of which can be off."""

    def __init__(self, d_model: int, mixer: nn.Module, use_norm: bool, use_res: bool) -> None:
        super().__init__()
        self.norm = Norm(d_model, EPS) if use_norm else None
        self.mixer = mixer
        self.use_res = use_res

    def forward(self, sequence: Float[Tensor, "B N C"]) -> Float[Tensor, "B N C"]:
        """Return sequence + mixer(norm(sequence)), (B, N, C)."""
        mixed = self.mixer(sequence if self.norm is None else self.norm(sequence))
        return sequence + mixed if self.use_res else mixed


class BimbaCompressor(nn.Module):
    """Compress video tokens into queries (BIMBA, arXiv 2503.09590; upstream's `MambaCompressor`):

        for each layer:
            s = tokens and queries, every query behind its stretch of tokens (`interleave`)
            s = s + mixer(norm(s))
            tokens, queries = the places of either in s
            tokens = every second frame of tokens, if multi_scale
        return queries

    `mixer_type` is "mamba", the mixer of VideoMamba (both directions summed, each with its skip D), or "attention". With
    `bimamba=False` there is the forward direction only. With `fp32` a layer computes in at least float32 whatever the dtype of
    the sequence; its parameters then have to be float32 too. Parameter names and shapes are upstream's. `query_pos` is "inter";
    upstream's "right" never worked.

    `initial_values` "upstream" are those of upstream's mixer: dt_proj_b has no special bias, and A_b_log has zeros at [i, i]
    for i < d_state, so that the backward direction forgets within some 20 tokens. "corrected" draws the backward direction
    like the forward one. `zero_out_proj` makes the compressor return its queries, which is how upstream's training starts.

    Raise ValueError for an unknown `mixer_type`, `query_pos` or `initial_values`, and sizes that are no positive integers.
    """

    def __init__(
        self,
        d_model: int,
        n_layer: int = 1,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        bimamba: bool = True,
        use_norm: bool = True,
        use_res: bool = True,
        multi_scale: bool = True,
        mixer_type: str = "mamba",
        fp32: bool = False,
        query_pos: str = "inter",
        initial_values: str = "upstream",
    ) -> None:
        super().__init__()
        counts = {"d_model": d_model, "n_layer": n_layer, "d_state": d_state, "d_conv": d_conv, "expand": expand}
        for name, value in counts.items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} is {value!r}; allowed are whole numbers from 1 up")
        if mixer_type not in ("mamba", "attention"):
            raise ValueError(f"mixer_type is {mixer_type!r}; allowed are 'mamba' and 'attention'")
        if query_pos != "inter":
            raise ValueError(f"query_pos is {query_pos!r}; allowed is 'inter': queries stand among the tokens")
        if initial_values not in ("upstream", "corrected"):
            raise ValueError(f"initial_values is {initial_values!r}; allowed are 'upstream' and 'corrected'")
        self.d_model, self.multi_scale, self.fp32 = d_model, multi_scale, fp32

        def mixer() -> nn.Module:
            if mixer_type == "attention":
                return Attention(d_model, expand)
            mamba = Mamba(d_model, d_state, d_conv, expand, bimamba=bimamba)
            if bimamba:
                init_backward_direction(mamba, initial_values)
            return mamba

        self.layers = nn.ModuleList(CompressorLayer(d_model, mixer(), use_norm, use_res) for _ in range(n_layer))

    @torch.no_grad()
    def zero_out_proj(self) -> None:
        """Set the weight of the last layer's out_proj to zero: with `use_res` the output then is the queries."""
        out_proj: Any = self.layers[-1].get_submodule("mixer.out_proj")
        nn.init.zeros_(out_proj.weight)

    def forward(
        self, tokens: Float[Tensor, "B F H W C"], queries: Float[Tensor, "B G Q C"]
    ) -> Float[Tensor, "B G Q C"]:
        """Return the queries (B, G, Q, C) after all layers, given the tokens (B, F, H, W, C) of F frames.

        With `multi_scale`, layer i reads every 2^i-th frame, the first among them. Raise ValueError for shapes that do not fit
        each other and for no query or no token.
        """
        check_compressor_inputs(tokens, queries, self.d_model)
        frame, q = tokens.shape[2:], queries.flatten(1, 2)
        for layer in self.layers:
            t = tokens.flatten(1, 3)
            places = interleave(t.shape[1], q.shape[1]).to(t.device)
            is_query = torch.zeros(t.shape[1] + q.shape[1], dtype=torch.bool, device=t.device)
            is_query[places] = True
            token_places = is_query.logical_not().nonzero().squeeze(1)

            s = t.new_empty(t.shape[0], len(is_query), t.shape[2])
            s = s.index_copy(1, token_places, t).index_copy(1, places, q)
            s = layer(s.to(accumulation_dtype(s.dtype))).to(s.dtype) if self.fp32 else layer(s)
            q, tokens = s[:, places], s[:, token_places].unflatten(1, (-1, *frame[:2]))
            if self.multi_scale:
                tokens = tokens[:, ::2]
        return q.view_as(queries)


@torch.no_grad()
def init_backward_direction(mixer: Mamba, initial_values: str) -> None:
    """Give the backward direction the initial values that `BimbaCompressor` names."""
    E, N = mixer.A_b_log.shape
    if initial_values == "upstream":
        i = torch.arange(min(E, N), device=mixer.A_b_log.device)
        mixer.A_b_log[i, i] = 0
        return
    nn.init.uniform_(mixer.dt_proj_b.weight, -(mixer.dt_rank**-0.5), mixer.dt_rank**-0.5)
    uniform = torch.rand_like(mixer.dt_proj_b.bias, dtype=torch.float32)
    dt = torch.exp(uniform * math.log(0.1 / 0.001) + math.log(0.001))
    mixer.dt_proj_b.bias.copy_(dt + torch.log(-torch.expm1(-dt)))


def check_compressor_inputs(tokens: Tensor, queries: Tensor, d_model: int) -> None:
    """Raise ValueError for tokens and queries that the compressor cannot take, naming the argument."""
    if tokens.dim() != 5:
        raise ValueError(f"tokens have shape {tuple(tokens.shape)}; allowed is (B, F, H, W, {d_model})")
    if queries.dim() != 4:
        raise ValueError(f"queries have shape {tuple(queries.shape)}; allowed is (B, frames, queries of a frame, {d_model})")
    for name, x in (("tokens", tokens), ("queries", queries)):
        if x.shape[-1] != d_model:
            raise ValueError(f"{name} have {x.shape[-1]} channels; allowed are the compressor's d_model, {d_model}")
        if x.shape[1:-1].numel() == 0:
            raise ValueError(f"{name} have shape {tuple(x.shape)}; allowed is at least one for every clip")
    if tokens.shape[0] != queries.shape[0]:
        raise ValueError(f"queries are of {queries.shape[0]} clips; allowed are as many as tokens have, {tokens.shape[0]}")
    if tokens.dtype != queries.dtype or tokens.device != queries.device:
        raise ValueError(
            f"queries are {queries.dtype} on {queries.device}; allowed is what tokens are, {tokens.dtype} on {tokens.device}"
        )
