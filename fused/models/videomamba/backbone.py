"""Embedding, positions, blocks and final norm: what both models of `videomamba.py` stand on, for whole videos and chunks."""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from fused import backends, stamp
from fused.chunked import online
from fused.chunked import video as chunked
from fused.chunked.video import Chunks, Video
from fused.models.videomamba.block import Block
from fused.models.videomamba.config import VideoMambaConfig
from fused.models.videomamba.embedding import PatchEmbed, Span, span_of, temporal_positions, visible_tokens
from fused.models.videomamba.hub import Pretrained
from fused.models.videomamba.scan_order import Order, permute, restore, temporal_order
from fused.modules import mamba
from fused.modules.mamba import Mamba, check_backend
from fused.modules.norm import DropPath, Norm
from fused.modules.state import State, States, blank_mean, pack, unpack


class _Stream(NamedTuple):
    """What leaves the last block: its output and the residual stream before it, in the order of `walk` (None: as stored)."""

    hidden: Tensor
    residual: Tensor
    walk: Order | None
    states: States | None
    features: list[Tensor]


class Backbone(Pretrained, nn.Module):
    """Embedding, positions, blocks, final norm: all that the two models share.

    Token 0 is CLS, token 1 + f*P + p is patch p of tubelet f. `backend` is a name of `fused.backends`, which never
    changes, or "auto", which the device of the first input decides.
    """

    def __init__(self, config: VideoMambaConfig, drop_path_rate: float, backend: str = "auto") -> None:
        super().__init__()
        self.config = config
        self._asked = check_backend(backend)
        self._chosen: tuple[str, str] | None = None  # (device type, backend): plain strings travel with copies and pickles
        D, depth = config.embed_dim, config.depth
        rate = drop_path_rate if config.drop_path_rate is None else config.drop_path_rate
        self.patch_embed = PatchEmbed(config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, D))
        self.pos_embed = nn.Parameter(torch.zeros(1, config.patches + 1, D))
        if config.num_frames is not None:
            self.temporal_pos_embedding = nn.Parameter(torch.zeros(1, config.tubelets, D))
        self.pos_drop = nn.Dropout(config.drop_rate)
        # upstream's rates lag one layer: 0, 0, then up; the last of the ramp falls to the path before the final norm
        rates = [0.0] + [rate * i / max(depth - 1, 1) for i in range(depth - 1)]
        self.layers = nn.ModuleList(Block(config, i, rates[i], backend) for i in range(depth))
        self.drop_path = DropPath(rate)

    @property
    def backend(self) -> str:
        """The name given; for "auto" that, until the first input has decided."""
        return self._chosen[1] if self._chosen else self._asked

    @property
    def final_norm(self) -> Norm:
        """The norm after the last block."""
        raise NotImplementedError

    @property
    def reads_mean(self) -> bool:
        """Whether the output is a mean over tokens: then (count, total) is the last entry of the state."""
        raise NotImplementedError

    def _final_norm(self) -> Norm:
        return Norm(self.config.embed_dim, self.config.norm_epsilon, "rms" if self.config.rms_norm else "layer")

    @torch.no_grad()
    def _init_weights(self) -> None:
        """Upstream's effective initial values: it redraws every Linear, dt_proj included, so that delta starts at 0.69."""
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        rescaled = {module.out_proj for module in self.modules() if isinstance(module, Mamba)}
        for module in self.modules():
            if not isinstance(module, nn.Linear):
                continue
            if module in rescaled:  # kaiming_uniform(a=sqrt(5)) over sqrt(depth)
                bound = 1 / math.sqrt(module.in_features * self.config.depth)
                module.weight.uniform_(-bound, bound)
            else:
                nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                module.bias.zero_()

    def no_weight_decay(self) -> set[str]:
        """The parameters that upstream's optimisers do not decay, besides biases and vectors."""
        names = {"cls_token", "pos_embed"}
        return names if self.config.num_frames is None else names | {"temporal_pos_embedding"}

    def embed(
        self, clip: Float[Tensor, "B C *T H W"], mask: Bool[Tensor, "B L"] | None = None, use_image: bool = False, *,
        temporal_pos_offset: int | None = None, temporal_pos_total: int | None = None,
    ) -> Float[Tensor, "B V D"]:  # fmt: skip
        """Visible tokens with positions: cls + pos[0], then patch(f, p) + pos[1 + p] + temporal[f].

        The clip is the whole video; with `temporal_pos_offset` it is a chunk: any number of whole tubelets, of which so
        many came before. Chunks side by side are the whole's tokens: CLS goes before tubelet 0 only, and a mask has a
        column for each token of the chunk. `temporal_pos_total`, in tubelets, is the length of a video that is not as
        long as the temporal table: the table is stretched to it, for every chunk alike.

        `use_image` takes a clip of one tubelet, without its temporal position. Raises ValueError or TypeError for a clip,
        mask or place in the video that the model was not built for.
        """
        span = span_of(clip, self.config, use_image, temporal_pos_offset, temporal_pos_total)
        return self._embed(clip, span, self._kept(clip, mask, span), use_image)

    def _kept(self, clip: Tensor, mask: Tensor | None, span: Span) -> Tensor | None:
        length = span.length(self.config.patches)
        return None if mask is None else visible_tokens(mask, clip.shape[0], length, clip.device, span.cls)

    def _embed(self, clip: Tensor, span: Span, kept: Tensor | None, use_image: bool) -> Tensor:
        return self.pos_drop(self._place(clip, span, kept, use_image))

    def _place(self, clip: Tensor, span: Span, kept: Tensor | None = None, use_image: bool = False) -> Tensor:
        timed = self.config.num_frames is not None and not use_image
        times = temporal_positions(self.temporal_pos_embedding, span) if timed else None
        return self._placed(clip, times, span.cls, kept)

    def _placed(self, clip: Tensor, times: Tensor | None, cls: int, kept: Tensor | None = None) -> Tensor:
        """Tokens with positions, `times` (T', D) being the tubelets', and CLS in front where `cls` is 1."""
        positions = self.pos_embed[0, 1:]
        if times is not None:
            positions = (times[:, None] + positions).flatten(0, 1)
        if kept is not None:
            kept = kept[:, cls:] - cls
            positions = positions[kept]
        tokens = self.patch_embed(clip, kept) + positions
        if not cls:
            return tokens
        first = (self.cls_token + self.pos_embed[:, :1]).expand(clip.shape[0], -1, -1)
        return torch.cat((first, tokens), dim=1)

    def init_state(
        self, batch_size: int, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> list[State]:
        """The state of a stream that begins, for `ssm_state`; `fused.modules.state` says what it is made of.

        `dtype` is the stream's: by default that of the parameters, or of autocast where it is on. `device` is by default that
        of the parameters. Raises ValueError for a bidirectional model and for a batch of none.
        """
        states = [m.init_state(batch_size, dtype, device) for m in self.modules() if isinstance(m, Mamba)]
        return [*states, blank_mean(states[0], self.config.embed_dim)] if self.reads_mean else states

    def encode(
        self, tokens: Float[Tensor, "B V D"], mask: Bool[Tensor, "B L"] | None = None, *,
        state: States | None = None, return_state: bool = False, taps: Sequence[int] = (),
    ) -> tuple[Tensor, States | None, list[Tensor]]:  # fmt: skip
        """Run the blocks and the final norm over embedded tokens.

        `state`, one (conv_state, ssm_state) a layer, continues a token sequence that was cut: causal models in spatial
        order only. `taps` names layers whose output is wanted, ascending: the final norm of the residual stream behind
        that layer; for the last layer the stream itself, which with fused_add_norm is without the last mixer's output.

        Returns (normed tokens as stored, new state in a container like the old one's, or None, tapped features). Raises
        ValueError for a state that does not fit the model, its scan order or its backend, TypeError for one of another type
        or dtype, BackendError for a backend that cannot run here.
        """
        kept, length = None, tokens.shape[1]
        if mask is not None and self.config.scan_order != "spatial":
            length = mask.shape[1]
            kept = visible_tokens(mask, tokens.shape[0], length, tokens.device)
        stream = self._run(tokens, kept, length, state, return_state, taps)
        return self._finish(stream.hidden, stream.residual, stream.walk), stream.states, stream.features

    def _run(
        self, tokens: Tensor, kept: Tensor | None, length: int,
        state: States | None = None, return_state: bool = False, taps: Sequence[int] = (),
    ) -> _Stream:  # fmt: skip
        """The blocks, over what a mask has left of `length` tokens. Those that every layer walks in temporal order are
        reordered once, before the first."""
        config, carried = self.config, state is not None or return_state
        before = self._unpack(tokens, state, carried)
        backend = self._resolve(tokens)
        order = self._order(tokens, kept, length)
        walk = order if config.scan_order == "temporal" else None
        if walk is not None:
            tokens, order = permute(tokens, walk), None

        states, features = [], []
        hidden: Tensor = tokens
        residual: Any = None
        for i, layer in enumerate(self.layers):
            hidden, residual, new = layer(hidden, residual, order, before[i], return_state, backend=backend)
            states.append(new)
            if i - 1 in taps:
                features.append(self.final_norm(residual.to(self.final_norm.weight.dtype), backend))
        hidden = self.drop_path(hidden)
        if config.depth - 1 in taps:
            features.append(residual if config.fused_add_norm else residual + hidden)
        if walk is not None:
            features = [restore(feature, walk) for feature in features]
        return _Stream(hidden, residual, walk, pack(states, state) if carried else None, features)

    def _order(self, tokens: Tensor, kept: Tensor | None, length: int) -> Order | None:
        """The temporal walk of these tokens, if any layer takes it."""
        patches = self.config.patches
        if self.config.scan_order == "spatial":
            return None
        if (length - 1) % patches:
            raise ValueError(f"{length} tokens are not CLS and frames of {patches} patches; pass the mask that left them")
        return temporal_order((length - 1) // patches, patches, kept, tokens.device)

    def _finish(
        self, hidden: Tensor, residual: Tensor, walk: Order | None = None, part: slice = slice(None), chunks: Chunks = ()
    ) -> Tensor:
        """The last sum and the final norm, as stored; of a part of the tokens if that is all that is wanted: the first or
        the last of them, which are so in every order. All of them are normed chunk by chunk where there are `chunks`."""
        if part != slice(None):
            return self._finish(hidden[:, part], residual[:, part])
        if chunks:
            return chunked.piecewise(self._finish, chunks, hidden, residual)
        norm, backend = self.final_norm, self._resolve(hidden)
        if self.config.fused_add_norm:
            normed = norm.add(hidden, residual, prenorm=False, backend=backend)
        else:
            normed = norm((residual + hidden).to(norm.weight.dtype), backend)
        return normed if walk is None else restore(normed, walk)

    def forward_approximate(
        self, clip: Video, *, chunk_frames: int, look_ahead: int = 0, temporal_pos_total: int | None = None
    ) -> Iterator[Tensor]:
        """Normed tokens (B, n, D) of every chunk, CLS with the first: not what the whole clip gives, but given at once.

        The backward direction starts anew behind every chunk and the `look_ahead` frames that it waits for; looking ahead
        to the end is exact. `clip` as of `forward_chunked`; nothing is dropped, and no gradient is recorded.

        Raises ValueError or TypeError for what does not fit the model.
        """
        for hidden, residual in online.windows(self, clip, chunk_frames, look_ahead, temporal_pos_total):
            with torch.no_grad():
                yield self._finish(hidden, residual)

    def _unpack(self, tokens: Tensor, state: States | None, carried: bool) -> Sequence[State | None]:
        if carried and self.config.scan_order != "spatial":
            raise ValueError(f"scan_order is {self.config.scan_order!r}; a state can only be carried in 'spatial' order")
        found = [None] * self.config.depth if state is None else unpack(state, self.config.depth, False, "state")
        backends.check_abilities("mixer", mamba.BACKENDS, self._asked, tokens.dtype, {"initial_state": state is not None})
        return found

    def _resolve(self, x: Tensor) -> str:
        """The backend of this forward: one choice, made again only if the model has moved to another kind of device."""
        if self._chosen is None or self._chosen[0] != x.device.type:
            fast = (self.config.ssm_cfg or {}).get("use_fast_path", True)
            backend = backends.choose(self._asked, x.device, use_fast_path=fast)
            if x.device.type == "cuda" and not torch.compiler.is_compiling():
                low = torch.is_autocast_enabled("cuda")
                stamp.remind(backend, torch.get_autocast_dtype("cuda") if low else x.dtype, x.device)
            self._chosen = x.device.type, backend
        return self._chosen[1]
