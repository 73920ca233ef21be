"""VideoMamba, fused: the classifier and the masked-pretraining encoder over one stack of bidirectional Mamba blocks."""

import logging
from dataclasses import fields
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from fused.chunked import video as chunked
from fused.chunked.video import Chunks, Video
from fused.models.videomamba.backbone import Backbone
from fused.models.videomamba.config import VideoMambaConfig
from fused.models.videomamba.embedding import sincos_positions, span_of
from fused.models.videomamba.load import load_checkpoint
from fused.models.videomamba.timm_api import Classifier
from fused.modules.norm import Norm
from fused.modules.state import State, States, continued, pack, running_mean

_log = logging.getLogger("fused")


_BLIND = "a causal model (bimamba=False) shows CLS, its token 0, nothing of a video"


class EncoderOutput(NamedTuple):
    """What `VideoMambaEncoder` returns."""

    tokens: Tensor  # (B, V, D) final-normed visible tokens; CLS is left out exactly when add_pool_norm
    pooled: Tensor | None  # (B, 1, D); (B, 2, D) for cls_cat_avg; (B, T', D) with keep_temporal; None without add_pool_norm
    clip: Tensor | None  # (K, B, V, clip_output_dim), CLS included; None when clip_return_layer is 0


class DistillOutput(NamedTuple):
    """What `VideoMamba` returns when distill_dim is set."""

    logits: Tensor  # (B, num_classes)
    features: Tensor  # (B, L, distill_dim) of unit length, CLS included


class VideoMamba(Classifier, Backbone):
    """The classifier: a clip (B, C, T, H, W), or an image (B, C, H, W), to logits (B, num_classes).

    `config.readout` is what the head reads: "cls", as upstream; "mean" of all patch tokens; the "last" of them; or "tokens",
    every patch token, with logits (B, T'*P, num_classes). With bimamba=False the model streams (`forward`), "mean" and
    "last" being of what has come so far, and has nothing to read in CLS.

    Loads upstream's state_dict: video_sm, image_sm (num_frames None), the distillation student (distill_dim).
    """

    def __init__(self, config: VideoMambaConfig, backend: str = "auto") -> None:
        if config.readout == "cls" and not config.bimamba:
            raise ValueError(
                f"readout is 'cls', but {_BLIND}: every clip would have the same logits; allowed: 'mean', 'last', 'tokens'"
            )
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

    @property
    def reads_mean(self) -> bool:
        return self.config.readout == "mean"

    def forward(
        self, clip: Float[Tensor, "B C *T H W"], *, ssm_state: States | None = None, return_state: bool = False,
        temporal_pos_offset: int | None = None, temporal_pos_total: int | None = None,
    ) -> Any:  # fmt: skip
        """Logits; a `DistillOutput` if distill_dim is set; with `return_state` (that, state).

        A causal model takes a video in chunks of any number of tubelets: each with the `ssm_state` that the one before
        returned and the number of tubelets before it, `temporal_pos_offset`; the first with neither, or with `init_state` and
        0. For `temporal_pos_total` see `embed`. Raises ValueError or TypeError for what does not fit.
        """
        chunk = continued(self.config, self.reads_mean, ssm_state, return_state, temporal_pos_offset)
        tokens = self.embed(clip, temporal_pos_offset=chunk.offset, temporal_pos_total=temporal_pos_total)
        output, states, mean = self._answer(tokens, int(not chunk.offset), chunk.states, chunk.mean, return_state)
        return (output, pack(states, ssm_state, mean)) if return_state else output

    def _answer(
        self, tokens: Tensor, cls: int, states: States | None, mean: State | None, return_state: bool
    ) -> tuple[Any, States | None, State | None]:
        """The output of embedded tokens, with CLS in front where `cls` is 1; the layers' states and the mean to carry."""
        stream = self._run(tokens, None, tokens.shape[1], states, return_state)
        tokens = self._finish(stream.hidden, stream.residual, stream.walk, self._part())
        read, mean = self._read(tokens, cls, mean)
        output: Any = self.head(self.head_drop(read))
        if self.config.distill_dim is not None:
            output = DistillOutput(output, self._distilled(tokens))
        return output, stream.states, mean

    def forward_chunked(
        self, clip: Video, *, chunk_frames: int, num_frames: int | None = None, offload: bool = False,
        temporal_pos_total: int | None = None,
    ) -> Tensor | DistillOutput:  # fmt: skip
        """What `forward` returns, gradients included, in the memory of `chunk_frames` frames: see `chunked.run`.

        `clip` is (B, C, T, H, W), or gives frames (B, C, H, W) or runs of them (B, C, t, H, W), `num_frames` in all. T may
        be less than the model's table of temporal positions; `temporal_pos_total`: see `embed`. `offload` keeps
        what a layer's first walk leaves for its second in host memory.

        Raises ValueError or TypeError for what does not fit the model, or cannot be chunked.
        """
        passed = chunked.run(self, clip, chunk_frames, num_frames, temporal_pos_total, offload)
        tokens = self._finish(passed.hidden, passed.residual, part=self._part(), chunks=passed.chunks)
        output = self.head(self.head_drop(self._read(tokens, 1, None)[0]))
        if self.config.distill_dim is None:
            return output
        return DistillOutput(output, chunked.piecewise(self._distilled, passed.chunks, tokens))

    def _part(self) -> slice:
        """Of which tokens the heads read: no more are normed. The first and the last one are so in every order."""
        whole = slice(None)
        if self.config.distill_dim is not None:
            return whole
        return {"cls": slice(0, 1), "last": slice(-1, None)}.get(self.config.readout, whole)

    def _distilled(self, tokens: Tensor) -> Tensor:
        norm, project = self.distill_head
        return F.normalize(project(norm(tokens, self._resolve(tokens))), dim=-1)

    def _read(self, tokens: Tensor, cls: int, before: State | None) -> tuple[Tensor, State | None]:
        """The head's input and the mean to carry, of normed tokens with CLS in front where `cls` is 1."""
        match self.config.readout:
            case "mean":
                return running_mean(tokens[:, cls:], before)
            case "tokens":
                return tokens[:, cls:], None
            case "last":
                return tokens[:, -1], None
        return tokens[:, 0], None


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
    """The encoder of masked pretraining and video-text models: video_mm's, or with add_pool_norm=False video_sm's.

    With bimamba=False it streams, like `VideoMamba`, and nothing may be pooled from CLS.
    """

    def __init__(self, config: VideoMambaConfig, backend: str = "auto") -> None:
        if config.add_pool_norm and "cls" in config.pool_type and not config.bimamba:
            raise ValueError(
                f"pool_type is {config.pool_type!r}, but {_BLIND}; allowed: 'avg', of all tokens so far, 'last', "
                "or add_pool_norm=False, which leaves the tokens"
            )
        super().__init__(config, 0.0, backend)
        self.norm = self._final_norm()
        self.clip_decoder = nn.ModuleList(ClipDecoder(config) for _ in range(config.clip_return_layer))
        if config.add_pool_norm:
            self.pool_norm = Norm(config.embed_dim, kind="layer")
        self._init_weights()

    @property
    def final_norm(self) -> Norm:
        return self.norm

    @property
    def reads_mean(self) -> bool:
        return self.config.add_pool_norm and self.config.pool_type == "avg"

    def forward(
        self, clip: Float[Tensor, "B C *T H W"], mask: Bool[Tensor, "B L"] | None = None, use_image: bool = False,
        keep_temporal: bool = False, *, ssm_state: States | None = None, return_state: bool = False,
        temporal_pos_offset: int | None = None, temporal_pos_total: int | None = None,
    ) -> Any:  # fmt: skip
        """Encode what `mask` (B, L; True = hidden; CLS, column 0, visible) leaves of a clip: an `EncoderOutput`, with
        `return_state` (that, state).

        `use_image`: the clip is one tubelet and gets no temporal position. `keep_temporal`: pool every tubelet by itself;
        the visible tokens must then divide by the tubelets.

        A causal model takes a video in chunks, by the rules of `VideoMamba.forward`; a chunk's mask is that of its own
        tokens. Tokens, clip features and pooled tubelets of all chunks side by side are the whole's; without keep_temporal
        `pooled` is of all that has come so far. Raises ValueError or TypeError for what does not fit.
        """
        config = self.config
        chunk = continued(config, self.reads_mean, ssm_state, return_state, temporal_pos_offset, use_image)
        span = span_of(clip, config, use_image, chunk.offset, temporal_pos_total)
        kept = self._kept(clip, mask, span)
        tokens = self._embed(clip, span, kept, use_image)
        length = span.length(config.patches)
        stream = self._run(tokens, kept, length, chunk.states, return_state, taps=config.student_layers())
        tokens, mean = self._finish(stream.hidden, stream.residual, stream.walk), None
        decoded = self._decode(stream.features, kept, length, span.first_token(config.patches))
        output = EncoderOutput(tokens, None, decoded)
        if config.add_pool_norm:
            cls, rest = tokens[:, : span.cls], tokens[:, span.cls :]
            pooled, mean = self._pool(cls, rest, span.tubelets if keep_temporal else None, chunk.mean)
            output = EncoderOutput(rest, self.pool_norm(pooled, self._resolve(tokens)), decoded)
        return (output, pack(stream.states, ssm_state, mean)) if return_state else output

    def forward_chunked(
        self, clip: Video, *, chunk_frames: int, num_frames: int | None = None, offload: bool = False,
        temporal_pos_total: int | None = None, keep_temporal: bool = False,
    ) -> EncoderOutput:  # fmt: skip
        """What `forward` returns without a mask, gradients included, in the memory of `chunk_frames` frames: see
        `VideoMamba.forward_chunked`."""
        config = self.config
        passed = chunked.run(self, clip, chunk_frames, num_frames, temporal_pos_total, offload, config.student_layers())
        tokens = self._finish(passed.hidden, passed.residual, chunks=passed.chunks)
        decoded = self._decode(passed.features, None, tokens.shape[1], chunks=passed.chunks)
        if not config.add_pool_norm:
            return EncoderOutput(tokens, None, decoded)
        cls, rest = tokens[:, :1], tokens[:, 1:]
        pooled, _ = self._pool(cls, rest, rest.shape[1] // config.patches if keep_temporal else None, None)
        return EncoderOutput(rest, self.pool_norm(pooled, self._resolve(tokens)), decoded)

    def _decode(
        self, features: list[Tensor], kept: Tensor | None, length: int, first: int = 0, chunks: Chunks = ()
    ) -> Tensor | None:
        """(B, V, D) of K layers to (K, B, V, clip_output_dim), None of none; every token gets its fixed position in the video
        first. Chunk by chunk where there are `chunks`."""
        if not features:
            return None
        positions = sincos_positions(length, self.config.embed_dim, features[0].device, first)
        positions = positions[None] if kept is None else positions[kept]
        backend = self._resolve(features[0])

        def decode(decoder: nn.Module, feature: Tensor) -> Tensor:
            return chunked.piecewise(lambda x, p: decoder(x + p.to(x.dtype), backend), chunks, feature, positions)

        return torch.stack([decode(own, feature) for own, feature in zip(self.clip_decoder, features, strict=True)])

    def _pool(self, cls: Tensor, rest: Tensor, parts: int | None, before: State | None) -> tuple[Tensor, State | None]:
        """(B, 1 or 2, D), or (B, parts, D) of so many tubelets, before the norm; and the mean to carry. By tubelets
        "cls_cat_avg" adds like "cls+avg", as upstream does."""
        kind = self.config.pool_type
        if kind == "cls":
            return cls, None
        if parts and rest.shape[1] % parts:
            raise ValueError(f"keep_temporal: {rest.shape[1]} visible tokens do not divide into {parts} equal tubelets")
        split = rest.unflatten(1, (parts or 1, -1))
        if kind == "last":
            return split[:, :, -1], None
        if kind == "avg":
            mean, after = running_mean(rest, before)
            return split.mean(dim=2) if parts else mean[:, None], after
        average = split.mean(dim=2)
        return torch.cat((cls, average), dim=1) if kind == "cls_cat_avg" and not parts else cls + average, None


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
