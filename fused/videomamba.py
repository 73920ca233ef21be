"""VideoMamba, fused: the classifier and the masked-pretraining encoder over one stack of bidirectional Mamba blocks."""

import logging
import math
from collections.abc import Sequence
from dataclasses import fields
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from . import backends, stamp
from .block import Block, DropPath, Norm
from .checkpoint import load_checkpoint
from .classifier import Classifier
from .config import VideoMambaConfig
from .mixer import Mamba, State, check_backend
from .orders import Order, permute, restore, temporal_order
from .pretrained import Pretrained
from .tokens import PatchEmbed, check_clip, sincos_positions, visible_tokens

_log = logging.getLogger("fused")


class EncoderOutput(NamedTuple):
    """What `VideoMambaEncoder` returns."""

    tokens: Tensor  # (B, V, D) final-normed visible tokens; CLS is left out exactly when add_pool_norm
    pooled: Tensor | None  # (B, 1, D); (B, 2, D) for cls_cat_avg; (B, T', D) with keep_temporal; None without add_pool_norm
    clip: Tensor | None  # (K, B, V, clip_output_dim), CLS included; None when clip_return_layer is 0


class DistillOutput(NamedTuple):
    """What `VideoMamba` returns when distill_dim is set."""

    logits: Tensor  # (B, num_classes)
    features: Tensor  # (B, L, distill_dim) of unit length, CLS included


class _Stream(NamedTuple):
    """What leaves the last block: its output and the residual stream before it, in the order of `walk` (None: as stored)."""

    hidden: Tensor
    residual: Tensor
    walk: Order | None
    states: list[State] | None
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
        self, clip: Float[Tensor, "B C *T H W"], mask: Bool[Tensor, "B L"] | None = None, use_image: bool = False
    ) -> Float[Tensor, "B V D"]:
        """Visible tokens with positions: cls + pos[0], then patch(f, p) + pos[1 + p] + temporal[f].

        `use_image` takes a clip of one tubelet, without its temporal position. Raises ValueError or TypeError for a clip
        or mask that the model was not built for.
        """
        check_clip(clip, self.config, use_image)
        return self._embed(clip, self._kept(clip, mask, use_image), use_image)

    def _kept(self, clip: Tensor, mask: Tensor | None, use_image: bool) -> Tensor | None:
        length = 1 + self.config.patches * (1 if use_image else self.config.tubelets)
        return None if mask is None else visible_tokens(mask, clip.shape[0], length, clip.device)

    def _embed(self, clip: Tensor, kept: Tensor | None, use_image: bool) -> Tensor:
        positions = self.pos_embed[0, 1:]
        if self.config.num_frames is not None and not use_image:
            positions = (self.temporal_pos_embedding[0, :, None] + positions).flatten(0, 1)
        if kept is not None:
            positions = positions[kept[:, 1:] - 1]
        patches = self.patch_embed(clip, kept) + positions
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(clip.shape[0], -1, -1)
        return self.pos_drop(torch.cat((cls, patches), dim=1))

    def encode(
        self, tokens: Float[Tensor, "B V D"], mask: Bool[Tensor, "B L"] | None = None, *,
        state: Sequence[State] | None = None, return_state: bool = False, taps: Sequence[int] = (),
    ) -> tuple[Tensor, list[State] | None, list[Tensor]]:  # fmt: skip
        """Run the blocks and the final norm over embedded tokens.

        `state`, one (conv_state, ssm_state) a layer, continues a token sequence that was cut: causal models in spatial
        order only. `taps` names layers whose output is wanted, ascending: the final norm of the residual stream behind
        that layer; for the last layer the stream itself, which with fused_add_norm is without the last mixer's output.

        Returns (normed tokens as stored, new state or None, tapped features). Raises ValueError for a state that does
        not fit the model, its scan order or its backend, BackendError for a backend that cannot run here.
        """
        kept = None
        if mask is not None and self.config.scan_order != "spatial":
            kept = visible_tokens(mask, tokens.shape[0], mask.shape[1], tokens.device)
        stream = self._run(tokens, kept, state, return_state, taps)
        return self._finish(stream), stream.states, stream.features

    def _run(
        self, tokens: Tensor, kept: Tensor | None,
        state: Sequence[State] | None = None, return_state: bool = False, taps: Sequence[int] = (),
    ) -> _Stream:  # fmt: skip
        """The blocks. Tokens that every layer walks in temporal order are reordered once, before the first."""
        config, carried = self.config, state is not None or return_state
        self._check_state(tokens, state, carried)
        backend = self._resolve(tokens)
        order = self._order(tokens, kept)
        walk = order if config.scan_order == "temporal" else None
        if walk is not None:
            tokens, order = permute(tokens, walk), None

        states, features = [], []
        hidden: Tensor = tokens
        residual: Any = None
        for i, layer in enumerate(self.layers):
            hidden, residual, new = layer(
                hidden, residual, order, state[i] if state is not None else None, return_state, backend=backend
            )
            states.append(new)
            if i - 1 in taps:
                features.append(self.final_norm(residual.to(self.final_norm.weight.dtype), backend))
        hidden = self.drop_path(hidden)
        if config.depth - 1 in taps:
            features.append(residual if config.fused_add_norm else residual + hidden)
        if walk is not None:
            features = [restore(feature, walk) for feature in features]
        return _Stream(hidden, residual, walk, states if carried else None, features)

    def _order(self, tokens: Tensor, kept: Tensor | None) -> Order | None:
        """The temporal walk of these tokens, if any layer takes it."""
        config, length = self.config, tokens.shape[1]
        if config.scan_order == "spatial":
            return None
        if kept is not None:
            return temporal_order(config.tubelets, config.patches, kept)
        if (length - 1) % config.patches:
            raise ValueError(
                f"{length} tokens are not CLS and frames of {config.patches} patches; pass the mask that left them"
            )
        return temporal_order((length - 1) // config.patches, config.patches, None, tokens.device)

    def _finish(self, stream: _Stream, first: int | None = None) -> Tensor:
        """The last sum and the final norm, as stored; of the `first` tokens only if that is all that is wanted."""
        hidden, residual, norm = stream.hidden[:, :first], stream.residual[:, :first], self.final_norm
        backend = self._resolve(hidden)
        if self.config.fused_add_norm:
            normed = norm.add(hidden, residual, prenorm=False, backend=backend)
        else:
            normed = norm((residual + hidden).to(norm.weight.dtype), backend)
        return normed if stream.walk is None or first == 1 else restore(normed, stream.walk)

    def _check_state(self, tokens: Tensor, state: Sequence[State] | None, carried: bool) -> None:
        if carried and self.config.scan_order != "spatial":
            raise ValueError(f"scan_order is {self.config.scan_order!r}; a state can only be carried in 'spatial' order")
        if state is not None and len(state) != self.config.depth:
            raise ValueError(f"state has {len(state)} entries; allowed: one per layer ({self.config.depth})")
        backends.check_abilities("mixer", self._asked, tokens.dtype, {"initial_state": state is not None})

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


class VideoMamba(Classifier, Backbone):
    """The classifier: a clip (B, C, T, H, W), or an image (B, C, H, W), to logits (B, num_classes) read from CLS.

    Loads upstream's state_dict: video_sm, image_sm (num_frames None), the distillation student (distill_dim).
    """

    def __init__(self, config: VideoMambaConfig, backend: str = "auto") -> None:
        super().__init__(config, 0.1, backend)
        self.norm_f = self._final_norm()
        self.head = nn.Linear(config.embed_dim, config.num_classes) if config.num_classes else nn.Identity()
        self.head_drop = nn.Dropout(config.fc_drop_rate)
        if config.distill_dim is not None:
            self.distill_head = nn.Sequential(Norm(config.embed_dim), nn.Linear(config.embed_dim, config.distill_dim))
        self._init_weights()

    @property
    def final_norm(self) -> Norm:
        return self.norm_f

    def forward(self, clip: Float[Tensor, "B C *T H W"]) -> Tensor | DistillOutput:
        """Logits (B, num_classes); a `DistillOutput` if distill_dim is set."""
        stream = self._run(self.embed(clip), None)
        if self.config.distill_dim is None:  # CLS, token 0 in every order, is all that the head reads
            return self._classify(self._finish(stream, first=1))
        tokens = self._finish(stream)
        norm, project = self.distill_head
        features = project(norm(tokens, self._resolve(tokens)))
        return DistillOutput(self._classify(tokens), F.normalize(features, dim=-1))

    def _classify(self, tokens: Tensor) -> Tensor:
        return self.head(self.head_drop(tokens[:, 0]))


class ClipDecoder(nn.Module):
    """A student's feature in the teacher's space: Linear, LayerNorm, then unit length if clip_norm_type is "l2"."""

    def __init__(self, config: VideoMambaConfig) -> None:
        super().__init__()
        self.head = nn.Linear(config.clip_decoder_embed_dim or config.embed_dim, config.clip_output_dim)
        self.norm = Norm(config.clip_output_dim, kind="layer")
        self.unit = config.clip_norm_type == "l2"

    def forward(self, feature: Tensor, backend: str = "auto") -> Tensor:
        out = self.norm(self.head(feature.to(self.head.weight.dtype)), backend)
        return out / out.norm(dim=-1, keepdim=True) if self.unit else out


class VideoMambaEncoder(Backbone):
    """The encoder of masked pretraining and video-text models: video_mm's, or with add_pool_norm=False video_sm's."""

    def __init__(self, config: VideoMambaConfig, backend: str = "auto") -> None:
        super().__init__(config, 0.0, backend)
        self.norm = self._final_norm()
        self.clip_decoder = nn.ModuleList(ClipDecoder(config) for _ in range(config.clip_return_layer))
        if config.add_pool_norm:
            self.pool_norm = Norm(config.embed_dim, kind="layer")
        self._init_weights()

    @property
    def final_norm(self) -> Norm:
        return self.norm

    def forward(
        self,
        clip: Float[Tensor, "B C *T H W"],
        mask: Bool[Tensor, "B L"] | None = None,
        use_image: bool = False,
        keep_temporal: bool = False,
    ) -> EncoderOutput:
        """Encode what `mask` (B, L; True = hidden; CLS, column 0, visible) leaves of a clip.

        `use_image`: the clip is one tubelet and gets no temporal position. `keep_temporal`: pool every tubelet by itself;
        the visible tokens must then divide by the tubelets. Raises ValueError or TypeError for a clip or mask that does
        not fit.
        """
        config = self.config
        tubelets = 1 if use_image else config.tubelets
        check_clip(clip, config, use_image)
        kept = self._kept(clip, mask, use_image)
        stream = self._run(self._embed(clip, kept, use_image), kept, taps=config.student_layers())
        tokens = self._finish(stream)
        decoded = self._decode(stream.features, kept, 1 + config.patches * tubelets) if stream.features else None
        if not config.add_pool_norm:
            return EncoderOutput(tokens, None, decoded)
        pooled = self.pool_norm(self._pool(tokens, tubelets if keep_temporal else 1, keep_temporal), self._resolve(tokens))
        return EncoderOutput(tokens[:, 1:], pooled, decoded)

    def _decode(self, features: list[Tensor], kept: Tensor | None, length: int) -> Tensor:
        """(B, V, D) of K layers to (K, B, V, clip_output_dim); every token gets its fixed position first."""
        positions = sincos_positions(length, self.config.embed_dim, features[0].device)
        positions = positions[None] if kept is None else positions[kept]
        backend = self._resolve(features[0])
        return torch.stack(
            [decode(x + positions.to(x.dtype), backend) for decode, x in zip(self.clip_decoder, features, strict=True)]
        )

    def _pool(self, tokens: Tensor, parts: int, keep_temporal: bool) -> Tensor:
        """(B, parts or 2, D) before its norm. With keep_temporal "cls_cat_avg" adds like "cls+avg", as upstream does."""
        kind, cls, rest = self.config.pool_type, tokens[:, :1], tokens[:, 1:]
        if kind == "cls":
            return cls
        if rest.shape[1] % parts:
            raise ValueError(f"keep_temporal: {rest.shape[1]} visible tokens do not divide into {parts} equal tubelets")
        average = rest.unflatten(1, (parts, -1)).mean(dim=2)
        if kind == "avg":
            return average
        return torch.cat((cls, average), dim=1) if kind == "cls_cat_avg" and not keep_temporal else cls + average


def build_videomamba(config: SimpleNamespace | VideoMambaConfig, backend: str = "auto") -> VideoMambaEncoder:
    """The encoder from the `SimpleNamespace(vision_encoder=...)` of the VideoMamba Backbone, any field of which may be absent.

    As there, pooled features are normed and decoded features have no unit length. `pretrained` is a file that
    `load_checkpoint` takes; it is loaded strictly.
    """
    if not isinstance(config, VideoMambaConfig):
        config = _from_namespace(config)
    model = VideoMambaEncoder(config, backend)
    if config.pretrained:
        load_checkpoint(model, config.pretrained)
    return model


def _from_namespace(config: SimpleNamespace) -> VideoMambaConfig:
    given: dict[str, Any] = dict(vars(config.vision_encoder))
    unknown = sorted(given.keys() - {f.name for f in fields(VideoMambaConfig)})
    if unknown:
        _log.warning("build_videomamba ignores the unknown field(s) %s", ", ".join(unknown))
    return VideoMambaConfig(**{"clip_norm_type": "none", **{k: v for k, v in given.items() if k not in unknown}})
