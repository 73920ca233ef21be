"""The compressor of BIMBA: queries interleaved with video tokens, mixed by a bidirectional selective scan, and read out."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fused import backends
from fused.models.bimba.attention import Attention
from fused.models.bimba.checks import check_inputs, check_parameter
from fused.models.bimba.chunked import check_chunkable, compress_chunks, split_chunks
from fused.models.bimba.interleave import places_of
from fused.models.bimba.layer import CompressorLayer
from fused.modules import mamba
from fused.modules.mamba import Mamba, check_backend, inverse_softplus
from fused.rules import check_integer
from fused.runtime.checks import check_choice, check_tensor
from fused.runtime.dtypes import accumulation_dtype

MIXERS = ("mamba", "attention")
INITIAL_VALUES = ("upstream", "corrected")


class BimbaCompressor(nn.Module):
    """Compress video tokens into queries (BIMBA, arXiv 2503.09590; upstream's `MambaCompressor`).

    Every query stands behind its stretch of tokens (`interleave`). A layer adds mixer(norm(sequence)) to the sequence. With
    `multi_scale` every layer but the first reads every second frame of the one before. The queries behind the last layer are
    the result; that layer computes nothing that only tokens would need.

    `mixer_type` is "mamba" or "attention" (by SDPA). With `bimamba=False` there is the forward direction only. With `fp32` a
    layer computes in at least float32 whatever the dtype of its input; its parameters then have to be float32 too.
    `initial_values` "upstream" leaves the backward direction's step sizes near 0.7, so that it forgets within some 20 tokens;
    "corrected" draws it like the forward one. `zero_out_proj` makes the compressor return its queries, which is how upstream's
    training starts. `backend` is a name of `fused.backends`, or "auto". Loads upstream's state_dict.

    Raises TypeError or ValueError for sizes that are no positive integers, and ValueError for an unknown `mixer_type`,
    `query_pos`, `initial_values` or backend. `query_pos` is "inter"; upstream's "right" never worked.
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
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        counts = {"d_model": d_model, "n_layer": n_layer, "d_state": d_state, "d_conv": d_conv, "expand": expand}
        for name, value in counts.items():
            check_integer("BimbaCompressor", name, value, 1)
        check_choice("BimbaCompressor", "mixer_type", mixer_type, MIXERS)
        check_choice("BimbaCompressor", "query_pos", query_pos, ("inter",))
        check_choice("BimbaCompressor", "initial_values", initial_values, INITIAL_VALUES)
        self.requested_backend = check_backend(backend)
        self.d_model, self.multi_scale, self.fp32 = d_model, multi_scale, fp32

        def mixer() -> Mamba | Attention:
            if mixer_type == "attention":
                return Attention(d_model, expand)
            module = Mamba(d_model, d_state, d_conv, expand, bimamba=bimamba, backend=backend)
            if bimamba:
                _init_backward_direction(module, initial_values)
            return module

        self.layers = nn.ModuleList(CompressorLayer(d_model, mixer(), use_norm, use_res) for _ in range(n_layer))

    @torch.no_grad()
    def zero_out_proj(self) -> None:
        """Set the weight of the last layer's out_proj to zero: with `use_res` the output then is the queries."""
        out_proj: Any = self.layers[-1].get_submodule("mixer.out_proj")
        out_proj.weight.zero_()

    def resolve_backend(self, x: Tensor) -> str:
        """Return the name of the backend that runs where `x` is. Raises BackendError for one that cannot run there."""
        return backends.choose(self.requested_backend, x.device)

    def forward(
        self, tokens: Float[Tensor, "B F H W C"], queries: Float[Tensor, "B G Q C"]
    ) -> Float[Tensor, "B G Q C"]:
        """Return the queries (B, G, Q, C) after all layers, given the tokens (B, F, H, W, C) of F frames.

        Raises TypeError for what is no tensor of floating-point numbers; ValueError for shapes, dtypes and devices that do not
        fit each other, the parameters or the backend, and for no token or query.
        """
        check_inputs(tokens, queries, self.d_model)
        dtype = accumulation_dtype(tokens.dtype) if self.fp32 else tokens.dtype
        self._check_parameters(queries, dtype)
        backends.check_abilities("BimbaCompressor", mamba.BACKENDS, self.requested_backend, dtype, {})
        backend, frame, q = self.resolve_backend(tokens), tokens.shape[2:4], queries.flatten(1, 2)
        layers: Any = self.layers
        for i, layer in enumerate(layers):
            t = tokens.flatten(1, 3)
            places, given = places_of(t.shape[1], q.shape[1], t.device), q.dtype
            inputs = (t.to(dtype), q.to(dtype), places, backend) if self.fp32 else (t, q, places, backend)
            if i == len(layers) - 1:
                q = layer.read(*inputs)
                q = q.to(given) if self.fp32 else q  # without a residual, autocast's dtype comes out
                break
            t, q = layer(*inputs)
            t, q = (t.to(given), q.to(given)) if self.fp32 else (t, q)
            tokens = t.unflatten(1, (-1, *frame))
            tokens = every_second_frame(tokens) if self.multi_scale else tokens
        return q.view(queries.shape)

    def forward_chunked(
        self, tokens: Tensor | Iterable[Tensor], queries: Float[Tensor, "B G Q C"], *, chunk_frames: int | None = None,
        offload: bool = False,
    ) -> Float[Tensor, "B G Q C"]:  # fmt: skip
        """Return what `forward` returns, in the memory of a chunk and of the queries; tokens are read twice.

        `tokens` is an iterator of chunks (B, frames, H, W, C), which may lie in the memory of the host, or one tensor, which is
        cut every `chunk_frames` frames. All chunks are held where they are until the end, with `offload` as copies in host
        memory. Queries are on the compressor's device. Gradients flow, but then every chunk keeps its intermediate tensors.

        Raises TypeError or ValueError for chunks that do not fit each other, the queries or the parameters: for the first one
        before the next is asked for. Raises ValueError for a compressor of several layers, with attention, with wrapped
        modules, or on a backend that carries no state. What the iterator raises goes on to the caller.
        """
        layers: Any = list(self.layers)
        check_chunkable(layers, self.requested_backend)
        check_tensor("BimbaCompressor", "queries", queries, "B G Q C", {"C": self.d_model}, None)
        dtype = accumulation_dtype(queries.dtype) if self.fp32 else queries.dtype
        self._check_parameters(queries, dtype)
        chunks = split_chunks(tokens, queries, self.d_model, chunk_frames, offload)
        out = compress_chunks(layers[0], chunks, queries, dtype, self.resolve_backend(queries))
        return out.to(queries.dtype) if self.fp32 else out

    def _check_parameters(self, queries: Tensor, dtype: torch.dtype) -> None:
        """Check the layers' first products; a wrapped one has a dtype of its own."""
        for layer in self.layers:
            in_proj = layer.get_submodule("mixer.in_proj")
            if type(in_proj) is nn.Linear:
                check_parameter(in_proj.weight, queries, dtype)


def every_second_frame(tokens: Float[Tensor, "B F H W C"]) -> Float[Tensor, "B G H W C"]:
    """Return the tokens (B, G, H, W, C) of every second frame, the first among them."""
    return tokens[:, ::2]


@torch.no_grad()
def _init_backward_direction(mixer: Mamba, initial_values: str) -> None:
    """Give the backward direction the initial values that `BimbaCompressor` names."""
    if initial_values == "upstream":
        mixer.A_b_log.diagonal().zero_()  # of the first d_state channels
        return
    bound = 1 / math.sqrt(mixer.dt_rank)
    mixer.dt_proj_b.weight.uniform_(-bound, bound)
    step = torch.empty_like(mixer.dt_proj_b.bias, dtype=torch.float32).uniform_(math.log(1e-3), math.log(0.1)).exp_()
    mixer.dt_proj_b.bias.copy_(inverse_softplus(step))
