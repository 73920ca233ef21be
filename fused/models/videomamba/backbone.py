"""The common part of both models of `model.py`: embedding, layers and final norm, for whole videos and for chunks."""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from fused import backends, stamp
from fused.chunked import online
from fused.chunked.video import Chunks, Video, apply_per_chunk
from fused.models.videomamba.block import Block
from fused.models.videomamba.config import VideoMambaConfig
from fused.models.videomamba.embedding import PatchEmbed, span_of, temporal_positions, visible_tokens
from fused.models.videomamba.hub import Pretrained
from fused.models.videomamba.scan_order import Order, permute, restore, temporal_order
from fused.modules import mamba
from fused.modules.mamba import Mamba, check_backend
from fused.modules.norm import DropPath, Norm
from fused.modules.residual import final_norm, norm_stream
from fused.modules.span import Span
from fused.modules.state import State, States, pack, unpack, zero_mean
from fused.modules.wrapped import log_slow_path
from fused.runtime.initial_values import trunc_normal_

_ALL = slice(None)


class LayersOutput(NamedTuple):
    """The output of the last layer (B, V, D) and the residual stream before it, both in `order` (None: storage order)."""

    hidden: Tensor
    residual: Tensor
    order: Order | None
    states: States | None  # in a container like that of the given states; None if none are carried
    features: list[Tensor]  # (B, V, D) of every layer of `out_layers`, in storage order
    backend: str


class Backbone(Pretrained, nn.Module):
    """Embedding, positions, layers and final norm of the classifier and the encoder.

    Token 0 is CLS, token 1 + f*P + p is patch p of tubelet f. `backend` is a name of `fused.backends`, or "auto", for which
    the device of the first input decides.
    """

    def __init__(self, config: VideoMambaConfig, drop_path_rate: float, backend: str = "auto") -> None:
        super().__init__()
        self.config = config
        self.requested_backend = check_backend(backend)
        self._resolved: tuple[str, str] | None = None  # (device type, backend): plain strings travel with copies and pickles
        D, depth = config.embed_dim, config.depth
        rate = drop_path_rate if config.drop_path_rate is None else config.drop_path_rate
        self.patch_embed = PatchEmbed(config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, D))
        self.pos_embed = nn.Parameter(torch.zeros(1, config.patches + 1, D))
        if config.num_frames is not None:
            self.temporal_pos_embedding = nn.Parameter(torch.zeros(1, config.tubelets, D))
        self.pos_drop = nn.Dropout(config.drop_rate)
        # as upstream, the ramp starts one layer late: 0, 0, then up; its last rate is that of the path before the final norm
        rates = [0.0] + [rate * i / max(depth - 1, 1) for i in range(depth - 1)]
        self.layers = nn.ModuleList(Block(config, i, rates[i], backend) for i in range(depth))
        self.drop_path = DropPath(rate)

    @property
    def backend(self) -> str:
        """The backend that runs; before the first input the name that was given."""
        return self._resolved[1] if self._resolved else self.requested_backend

    @property
    def final_norm(self) -> Norm:
        """The norm after the last layer."""
        raise NotImplementedError

    @property
    def reads_mean(self) -> bool:
        """Whether the output is a mean over tokens; if so, (count, total) is the last entry of the state."""
        raise NotImplementedError

    def _make_norm(self) -> Norm:
        """Return a new final norm."""
        return Norm(self.config.embed_dim, self.config.norm_epsilon, "rms" if self.config.rms_norm else "layer")

    @torch.no_grad()
    def _init_weights(self) -> None:
        """Draw upstream's effective initial values: every Linear is drawn again, dt_proj too, so that delta starts at 0.69."""
        trunc_normal_(self.pos_embed, std=0.02)
        rescaled = {module.out_proj for module in self.modules() if isinstance(module, Mamba)}
        for module in self.modules():
            if not isinstance(module, nn.Linear):
                continue
            if module in rescaled:  # kaiming_uniform(a=sqrt(5)) over sqrt(depth)
                bound = 1 / math.sqrt(module.in_features * self.config.depth)
                module.weight.uniform_(-bound, bound)
            else:
                trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                module.bias.zero_()

    def no_weight_decay(self) -> set[str]:
        """Return the names of parameters that upstream's optimisers do not decay, besides biases and vectors."""
        names = {"cls_token", "pos_embed"}
        return names if self.config.num_frames is None else names | {"temporal_pos_embedding"}

    def embed(
        self, clip: Float[Tensor, "B C *T H W"], mask: Bool[Tensor, "B L"] | None = None, use_image: bool = False, *,
        temporal_pos_offset: int | None = None, temporal_pos_total: int | None = None,
    ) -> Float[Tensor, "B V D"]:  # fmt: skip
        """Return the visible tokens with positions: cls + pos[0], then patch(f, p) + pos[1 + p] + temporal[f].

        Without `temporal_pos_offset` the clip is the whole video. With it the clip is a chunk of whole tubelets, and the offset
        is the number of tubelets before it. The tokens of all chunks, concatenated, are those of the whole video: CLS goes
        before tubelet 0 only. A mask has one column for each token of the chunk. `temporal_pos_total` is the number of tubelets
        of a video whose length is not that of the temporal table: the table is stretched to it, in every chunk. `use_image`
        takes a clip of one tubelet, and adds no temporal position. Raises ValueError or TypeError for a clip, a mask or a
        position in the video that does not fit the model.
        """
        span = span_of(clip, self.config, use_image, temporal_pos_offset, temporal_pos_total)
        return self.pos_drop(self.embed_span(clip, span, self.visible_indices(clip, mask, span), use_image))

    def visible_indices(self, clip: Tensor, mask: Tensor | None, span: Span) -> Tensor | None:
        """Return ascending indices (B, V) of the clip's tokens that a mask (B, L) leaves visible; None without a mask."""
        length = span.length(self.config.patches)
        return None if mask is None else visible_tokens(mask, clip.shape[0], length, clip.device, span.cls)

    def embed_span(self, clip: Tensor, span: Span, visible: Tensor | None = None, use_image: bool = False) -> Tensor:
        """Return tokens with positions (B, V, D) of a clip that holds the `span` of the video, before dropout."""
        timed = self.config.num_frames is not None and not use_image
        temporal = temporal_positions(self.temporal_pos_embedding, span) if timed else None
        return self.embed_tubelets(clip, temporal, span.cls, visible)

    def embed_tubelets(self, clip: Tensor, temporal: Tensor | None, cls: int, visible: Tensor | None = None) -> Tensor:
        """Return tokens with positions (B, V, D) of a clip, with CLS in front if `cls` is 1.

        `temporal` (T', D) holds the positions of the clip's tubelets, None for none; `visible` is as from `visible_indices`.
        """
        positions = self.pos_embed[0, 1:]
        if temporal is not None:
            positions = (temporal[:, None] + positions).flatten(0, 1)
        if visible is not None:
            visible = visible[:, cls:] - cls
            positions = positions[visible]
        tokens = self.patch_embed(clip, visible) + positions
        if not cls:
            return tokens
        first = (self.cls_token + self.pos_embed[:, :1]).expand(clip.shape[0], -1, -1)
        return torch.cat((first, tokens), dim=1)

    def init_state(
        self, batch_size: int, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> list[State]:
        """Return the state before the first token of `batch_size` videos, for `ssm_state`; see `fused.modules.state`.

        `dtype` is the stream's, by default that of the parameters, or autocast's where it is on. `device` is by default that of
        the parameters. Raises ValueError for a bidirectional model and for a batch_size below 1.
        """
        states = [m.init_state(batch_size, dtype, device) for m in self.modules() if isinstance(m, Mamba)]
        return [*states, zero_mean(states[0], self.config.embed_dim)] if self.reads_mean else states

    def encode(
        self, tokens: Float[Tensor, "B V D"], mask: Bool[Tensor, "B L"] | None = None, *,
        state: States | None = None, return_state: bool = False, out_layers: Sequence[int] = (),
    ) -> tuple[Tensor, States | None, list[Tensor]]:  # fmt: skip
        """Run the layers and the final norm over embedded tokens.

        `state`, one (conv_state, ssm_state) a layer, continues a token sequence that was cut; causal models in spatial order
        only. `out_layers` are the ascending numbers of layers whose feature is returned: the final norm of the residual stream
        after that layer; for the last layer the stream itself, which with fused_add_norm lacks the last mixer's output. `mask`
        (B, L) is that which left these tokens; scan orders other than "spatial" read it. With `return_state` the new state is
        returned.

        Returns (normed tokens in storage order, the new state in a container like the old one's, or None, the features). Raises
        ValueError for a state that does not fit the model, its scan order or its backend, TypeError for one of another type
        or dtype, BackendError for a backend that cannot run here.
        """
        visible, length = None, tokens.shape[1]
        if mask is not None and self.config.scan_order != "spatial":
            length = mask.shape[1]
            visible = visible_tokens(mask, tokens.shape[0], length, tokens.device)
        out = self.run_layers(tokens, visible, length, state, return_state, out_layers)
        return self.apply_final_norm(out.hidden, out.residual, out.backend, order=out.order), out.states, out.features

    def run_layers(
        self, tokens: Tensor, visible: Tensor | None, length: int,
        state: States | None = None, return_state: bool = False, out_layers: Sequence[int] = (),
    ) -> LayersOutput:  # fmt: skip
        """Run the layers over tokens (B, V, D), those that a mask leaves `visible` of `length`; the rest as in `encode`.

        Tokens that every layer scans in temporal order are permuted once, before the first layer.
        """
        config, carried = self.config, state is not None or return_state
        initial_states = self.unpack_states(tokens.dtype, state, carried)
        backend = self.resolve_backend(tokens)
        layer_order = self._temporal_order(tokens.device, visible, length)
        order = layer_order if config.scan_order == "temporal" else None
        if order is not None:
            tokens, layer_order = permute(tokens, order), None

        states, features = [], []
        hidden: Tensor = tokens
        residual: Any = None
        for i, layer in enumerate(self.layers):
            hidden, residual, new = layer(hidden, residual, layer_order, initial_states[i], return_state, backend=backend)
            states.append(new)
            if i - 1 in out_layers:  # the stream after layer i - 1 is summed in layer i
                features.append(self.layer_feature(residual, backend))
        log_slow_path()
        hidden = self.drop_path(hidden)
        if config.depth - 1 in out_layers:
            features.append(self.last_layer_feature(hidden, residual))
        if order is not None:
            features = [restore(feature, order) for feature in features]
        return LayersOutput(hidden, residual, order, pack(states, state) if carried else None, features, backend)

    def layer_feature(self, residual: Tensor, backend: str) -> Tensor:
        """Return the feature (B, V, D) of a layer that is not the last: the final norm of the residual stream after it."""
        return norm_stream(self.final_norm, residual, backend)

    def last_layer_feature(self, hidden: Tensor, residual: Tensor) -> Tensor:
        """Return the feature (B, V, D) of the last layer: as upstream, the stream, without `hidden` if fused_add_norm."""
        return residual if self.config.fused_add_norm else residual + hidden

    def _temporal_order(self, device: torch.device, visible: Tensor | None, length: int) -> Order | None:
        """Return the temporal order of `length` tokens, or of the visible ones; None if no layer scans in it."""
        patches = self.config.patches
        if self.config.scan_order == "spatial":
            return None
        if (length - 1) % patches:
            raise ValueError(f"tokens are {length}; allowed: CLS and frames of {patches} patches, or the mask that left these")
        return temporal_order((length - 1) // patches, patches, visible, device)

    def apply_final_norm(
        self, hidden: Tensor, residual: Tensor, backend: str, *, order: Order | None = None, part: slice = _ALL,
        chunks: Chunks = (),
    ) -> Tensor:  # fmt: skip
        """Return the final norm of the last layer's output plus the residual stream, (B, V, D), in storage order.

        `order` is that of the tokens (None: storage order). `part` selects the first or the last token, which no order moves;
        only that token is then normed. With `chunks` tokens are normed chunk by chunk.
        """
        if part != _ALL:
            hidden, residual, order, chunks = hidden[:, part], residual[:, part], None, ()

        def normed(hidden: Tensor, residual: Tensor) -> Tensor:
            fused = self.config.fused_add_norm
            return final_norm(self.final_norm, hidden, residual, fused_add_norm=fused, backend=backend)

        tokens = apply_per_chunk(normed, chunks, hidden, residual)
        return tokens if order is None else restore(tokens, order)

    def forward_approximate(
        self, clip: Video, *, chunk_frames: int, look_ahead: int = 0, temporal_pos_total: int | None = None
    ) -> Iterator[Tensor]:
        """Yield the normed tokens (B, n, D) of every chunk, CLS with the first, as soon as its frames have come.

        This approximates the whole clip's tokens: the backward scan starts from zeros after every chunk and the `look_ahead`
        frames after it. If these reach the end of the video, it is exact. `clip`, `chunk_frames` and `temporal_pos_total` are
        as in `forward_chunked`. Dropout and drop_path are off, and no gradient is recorded.

        Raises ValueError or TypeError for arguments that do not fit the model.
        """
        for out in online.run_approximate(self, clip, chunk_frames, look_ahead, temporal_pos_total):
            with torch.no_grad():
                yield self.apply_final_norm(out.hidden, out.residual, out.backend)

    def unpack_states(self, dtype: torch.dtype, state: States | None, carried: bool) -> Sequence[State | None]:
        """Return the state of every layer, None for zeros. `carried` says whether a state comes or is wanted back.

        Raises ValueError for a scan order or a backend that cannot carry a state for tokens of `dtype`, and what
        `fused.modules.state.unpack` raises.
        """
        if carried and self.config.scan_order != "spatial":
            raise ValueError(f"scan_order is {self.config.scan_order!r}; a state can only be carried in 'spatial' order")
        states = [None] * self.config.depth if state is None else unpack(state, self.config.depth, False, "state")
        wanted = {"initial_state": state is not None}
        backends.check_abilities("mixer", mamba.BACKENDS, self.requested_backend, dtype, wanted)
        return states

    def resolve_backend(self, x: Tensor) -> str:
        """Return the backend that runs on the device of `x`. The choice holds until the model moves to another type of device.

        Raises BackendError for a backend that cannot run on that device.
        """
        traced = torch.compiler.is_compiling()
        if traced or self._resolved is None or self._resolved[0] != x.device.type:
            use_fast_path = (self.config.ssm_cfg or {}).get("use_fast_path", True)
            backend = backends.choose(self.requested_backend, x.device, use_fast_path=use_fast_path)
            if traced:  # a choice that is kept would be a guard that its own second call does not pass
                return backend
            if x.device.type == "cuda":
                autocast = torch.is_autocast_enabled("cuda")
                stamp.remind(backend, torch.get_autocast_dtype("cuda") if autocast else x.dtype, x.device)
                if backend in ("native", "native_kept"):
                    from fused.models.videomamba.first_use import start_compiling

                    start_compiling(self.config, x, next(self.layers.parameters()).dtype, backend)
            self._resolved = x.device.type, backend
        return self._resolved[1]
