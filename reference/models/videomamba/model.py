"""VideoMamba: the classifier and the masked-pretraining encoder over one stack of bidirectional Mamba blocks."""

import logging
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from reference.models.videomamba.backbone import Backbone
from reference.models.videomamba.config import VideoMambaConfig
from reference.models.videomamba.embedding import Span, select_visible, sincos_positions, span_of
from reference.modules.norm import Norm
from reference.modules.state import ModelState, State, pack_state, running_mean

log = logging.getLogger("reference")

CLS_OF_CAUSAL_MODEL = "CLS is token 0, to which a causal model (bimamba=False) shows nothing of the video"


class EncoderOutput(NamedTuple):
    """The output of `VideoMambaEncoder`."""

    tokens: Tensor  # (B, V, D) final-normed visible tokens; without CLS exactly when add_pool_norm
    pooled: Tensor | None  # (B, 1, D), (B, 2, D) for cls_cat_avg, (B, T', D) with keep_temporal; None without add_pool_norm
    clip: Tensor | None  # (K, B, V+CLS, clip_output_dim), None when clip_return_layer is 0


class DistillOutput(NamedTuple):
    """The output of `VideoMamba` when distill_dim is set."""

    logits: Tensor  # (B, num_classes)
    features: Tensor  # (B, L, distill_dim), unit length, CLS included


class VideoMamba(Backbone):
    """The classifier: clip (B, C, T, H, W), or image (B, C, H, W), to logits (B, num_classes).

    `config.readout` is the feature that the head reads: "cls" (CLS, as upstream), "mean" (the mean of the patch tokens), "last"
    (the last patch token) or "tokens" (every patch token; logits are then (B, T'*P, num_classes)).

    With bimamba=False the model can stream: chunk by chunk it gives what the whole video gives. "mean" and "last" are those of
    all patch tokens so far. CLS contains nothing of the video in such a model, so it cannot be the readout.

    The state_dict is that of upstream's video_sm, with num_frames=None that of image_sm, and with distill_dim that of the
    student of self-distillation.
    """

    def __init__(self, config: VideoMambaConfig) -> None:
        if not config.bimamba and config.readout == "cls":
            raise ValueError(
                f"readout is 'cls'; {CLS_OF_CAUSAL_MODEL}: all clips would get the same logits; "
                "allowed: 'mean', 'last' or 'tokens'"
            )
        super().__init__(config, drop_path_rate=0.1)
        self.norm_f = self.make_final_norm()
        self.head = nn.Linear(config.embed_dim, config.num_classes) if config.num_classes else nn.Identity()
        self.head_drop = nn.Dropout(config.fc_drop_rate)
        if config.distill_dim is not None:
            self.distill_head = nn.Sequential(Norm(config.embed_dim), nn.Linear(config.embed_dim, config.distill_dim))
        self.init_weights()

    @property
    def final_norm(self) -> Norm:
        """The norm after the last block; its name in the state_dict is upstream's."""
        return self.norm_f

    @property
    def reads_mean(self) -> bool:
        """Whether the model reads a mean over the tokens so far."""
        return self.config.readout == "mean"

    def forward(
        self, clip: Float[Tensor, "B C *T H W"], *, ssm_state: ModelState | None = None, return_state: bool = False,
        temporal_pos_offset: int | None = None, temporal_pos_total: int | None = None,
    ) -> Any:  # fmt: skip
        """Return logits; with distill_dim a `DistillOutput`. With `return_state` return (that, state for the next `ssm_state`).

        For a chunk, `temporal_pos_offset` is the number of tubelets before it. `temporal_pos_total` is explained in `embed`.
        Raise ValueError or TypeError for a clip, offset or state that does not fit, and for a bidirectional model in chunks.
        """
        before, mean, offset = self.split_stream_state(ssm_state, return_state, temporal_pos_offset)
        tokens = self.embed(clip, temporal_pos_offset=offset, temporal_pos_total=temporal_pos_total)
        tokens, state, _ = self.encode(tokens, state=before, return_state=return_state)
        output, mean = self.apply_heads(tokens, tokens[:, int(not offset) :], mean)
        return (output, pack_state([*state, mean] if mean else state, ssm_state)) if return_state else output

    def apply_heads(self, tokens: Tensor, patches: Tensor, before: State | None = None) -> tuple[Any, State | None]:
        """Return (output of the heads, new running mean or None) from normed tokens (B, L, D); `patches` are those but CLS."""
        feature, mean = self._readout(tokens, patches, before)
        logits = self.head(self.head_drop(feature))
        if self.config.distill_dim is None:
            return logits, mean
        return DistillOutput(logits, F.normalize(self.distill_head(tokens), dim=-1)), mean

    def _readout(self, tokens: Tensor, patches: Tensor, before: State | None) -> tuple[Tensor, State | None]:
        """Return (feature (B, D) or (B, T'*P, D) of `config.readout`, new running mean or None)."""
        match self.config.readout:
            case "mean":
                return running_mean(patches, before)
            case "last":
                return patches[:, -1], None
            case "tokens":
                return patches, None
        return tokens[:, 0], None


class ClipDecoder(nn.Module):
    """Projection of a student's feature to the teacher's space: Linear, LayerNorm, unit length if clip_norm_type is "l2"."""

    def __init__(self, config: VideoMambaConfig) -> None:
        super().__init__()
        self.head = nn.Linear(config.clip_decoder_embed_dim or config.embed_dim, config.clip_output_dim)
        self.norm = Norm(config.clip_output_dim, kind="layer")
        self.unit = config.clip_norm_type == "l2"

    def forward(self, feature: Tensor) -> Tensor:
        """Return (..., clip_output_dim) from a feature (..., D)."""
        out = self.norm(self.head(feature.to(self.head.weight.dtype)))
        return out / out.norm(dim=-1, keepdim=True) if self.unit else out


class VideoMambaEncoder(Backbone):
    """The encoder of masked pretraining and of video-text models (upstream's PretrainVideoMamba and video_sm pretrain).

    With bimamba=False it can stream, as `VideoMamba` can. CLS contains nothing of the video then, so no pool_type may use it.
    """

    def __init__(self, config: VideoMambaConfig) -> None:
        if not config.bimamba and config.add_pool_norm and config.pool_type not in ("avg", "last"):
            raise ValueError(
                f"pool_type is {config.pool_type!r}; {CLS_OF_CAUSAL_MODEL}; allowed: 'avg' (of all tokens so far), 'last', or "
                "add_pool_norm=False for tokens alone"
            )
        super().__init__(config, drop_path_rate=0.0)
        self.norm = self.make_final_norm()
        self.clip_decoder = nn.ModuleList(ClipDecoder(config) for _ in range(config.clip_return_layer))
        if config.add_pool_norm:
            self.pool_norm = Norm(config.embed_dim, kind="layer")
        self.init_weights()

    @property
    def final_norm(self) -> Norm:
        """The norm after the last block; its name in the state_dict is upstream's."""
        return self.norm

    @property
    def reads_mean(self) -> bool:
        """Whether the model reads a mean over the tokens so far."""
        return self.config.add_pool_norm and self.config.pool_type == "avg"

    def forward(
        self, clip: Float[Tensor, "B C *T H W"], mask: Bool[Tensor, "B L"] | None = None, use_image: bool = False,
        keep_temporal: bool = False, *, ssm_state: ModelState | None = None, return_state: bool = False,
        temporal_pos_offset: int | None = None, temporal_pos_total: int | None = None,
    ) -> Any:  # fmt: skip
        """Return an `EncoderOutput`. With `return_state` return (that, state for the next `ssm_state`).

        mask (B, L) bool is True where a token of this clip is hidden; CLS (column 0) stays visible. `use_image` takes a clip of
        one tubelet and adds no temporal position. `keep_temporal` pools each tubelet by itself; the number of visible patch
        tokens must be a multiple of the number of tubelets.

        For a chunk, `temporal_pos_offset` is the number of tubelets before it. `temporal_pos_total` is explained in `embed`.
        The chunks' tokens, aligned features and tubelets' pools, side by side, are those of the whole video. `pooled` without
        `keep_temporal` is that of all tokens so far.

        Raise ValueError or TypeError for a clip, mask, offset or state that does not fit, and for a bidirectional model in
        chunks.
        """
        config = self.config
        before, mean, offset = self.split_stream_state(ssm_state, return_state, temporal_pos_offset, use_image)
        tokens = self.embed(clip, mask, use_image, temporal_pos_offset=offset, temporal_pos_total=temporal_pos_total)
        tokens, state, features = self.encode(
            tokens, mask, state=before, return_state=return_state, out_layers=config.student_layers()
        )  # fmt: skip
        span = span_of(clip, config, use_image, offset, temporal_pos_total)
        output, mean = self.apply_heads(tokens, features, span, mask, keep_temporal, mean)
        return (output, pack_state([*state, mean] if mean else state, ssm_state)) if return_state else output

    def apply_heads(
        self, tokens: Tensor, features: list[Tensor], span: Span, mask: Tensor | None = None, keep_temporal: bool = False,
        before: State | None = None,
    ) -> tuple[EncoderOutput, State | None]:  # fmt: skip
        """Return (output, new running mean or None) from normed tokens (B, V, D) and features (B, V, D) of student layers."""
        decoded = self._decode(features, mask, span.tokens(self.config.patches)) if features else None
        if not self.config.add_pool_norm:
            return EncoderOutput(tokens, None, decoded), None
        cls, rest = tokens[:, : span.has_cls], tokens[:, span.has_cls :]
        pooled, mean = self._pool(cls, rest, span.tubelets, keep_temporal, before)
        return EncoderOutput(rest, self.pool_norm(pooled), decoded), mean

    def _decode(self, features: list[Tensor], mask: Tensor | None, token_indices: range) -> Tensor:
        """Return (K, B, V, clip_output_dim) from the features (B, V, D) of K layers; fixed positions are added to them first.

        `token_indices` are those of the clip's tokens in the whole video.
        """
        positions = sincos_positions(token_indices.stop, features[0].shape[-1])[token_indices.start :].to(features[0].device)
        visible = select_visible(positions.expand(features[0].shape[0], -1, -1), mask)
        decoded = [decoder(f + visible.to(f.dtype)) for decoder, f in zip(self.clip_decoder, features, strict=True)]
        return torch.stack(decoded)

    def _pool(
        self, cls: Tensor, rest: Tensor, tubelets: int, keep_temporal: bool, before: State | None
    ) -> tuple[Tensor, State | None]:
        """Return (tokens pooled by pool_type, new running mean or None); cls is (B, 0 or 1, D), rest (B, V', D), both normed.

        As upstream, "cls_cat_avg" with `keep_temporal` adds like "cls+avg".
        """
        kind = self.config.pool_type
        if kind == "cls":
            return cls, None
        if keep_temporal and rest.shape[1] % tubelets:
            raise ValueError(
                f"keep_temporal is True, and {rest.shape[1]} visible tokens do not divide into {tubelets} equal tubelets; "
                "allowed: a mask that leaves as many in each, or keep_temporal=False"
            )
        parts = rest.unflatten(1, (tubelets if keep_temporal else 1, -1))
        if kind == "last":
            return parts[:, :, -1], None
        average = parts.mean(2)
        if kind == "avg":
            mean_so_far, after = running_mean(rest, before)
            return average if keep_temporal else mean_so_far[:, None], after
        return torch.cat((cls, average), dim=1) if kind == "cls_cat_avg" and not keep_temporal else cls + average, None


def build_videomamba(config: SimpleNamespace | VideoMambaConfig) -> VideoMambaEncoder:
    """Build the encoder from the `SimpleNamespace(vision_encoder=...)` of the VideoMamba Backbone, or from a configuration.

    Any field of the namespace may be absent. As in the Backbone, pooled features are normed and the outputs of the CLIP
    decoder are not scaled to unit length. `pretrained` is a file with the state_dict of this encoder, bare or under "model" or
    "module". It is loaded strictly. Raise ValueError for a wrong value, RuntimeError for weights that do not fit.
    """
    if not isinstance(config, VideoMambaConfig):
        given = dict(vars(config.vision_encoder))
        known = {f.name for f in fields(VideoMambaConfig)}
        if unknown := sorted(set(given) - known):
            log.warning("build_videomamba ignores the unknown field(s) %s", ", ".join(unknown))
        values: dict[str, Any] = {"clip_norm_type": "none"} | {k: v for k, v in given.items() if k in known}
        config = VideoMambaConfig(**values)
    model = VideoMambaEncoder(config)
    if config.pretrained:
        weights = torch.load(Path(config.pretrained), map_location="cpu", weights_only=True)
        for wrapper in ("model", "module"):
            weights = weights.get(wrapper, weights)
        model.load_state_dict(weights, strict=True)
    return model
