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
from reference.models.videomamba.embedding import Span, select, sincos_positions, span_of
from reference.modules.norm import Norm
from reference.modules.state import ModelState, State, packed, running_mean

log = logging.getLogger("reference")


BLIND = "CLS is token 0, to which a causal model (bimamba=False) shows nothing of the video"


class EncoderOutput(NamedTuple):
    """What `VideoMambaEncoder` returns."""

    tokens: Tensor  # (B, V, D) final-normed visible tokens; without CLS exactly when add_pool_norm
    pooled: Tensor | None  # (B, 1, D), (B, 2, D) for cls_cat_avg, (B, T', D) with keep_temporal; None without add_pool_norm
    clip: Tensor | None  # (K, B, V+CLS, clip_output_dim), None when clip_return_layer is 0


class DistillOutput(NamedTuple):
    """What `VideoMamba` returns when distill_dim is set."""

    logits: Tensor  # (B, num_classes)
    features: Tensor  # (B, L, distill_dim), unit length, CLS included


class VideoMamba(Backbone):
    """The classifier: clip (B, C, T, H, W), or image (B, C, H, W), to logits (B, num_classes), read by `config.readout` from
    CLS ("cls", upstream's), the mean of the patch tokens ("mean") or the last of them ("last"), or for every patch token
    ("tokens": logits (B, T'*P, num_classes)).

    With bimamba=False it streams: chunk by chunk it gives what the whole video gives, "mean" and "last" of all that was seen
    so far. CLS sees nothing then and cannot be read. Its state_dict is upstream's (video_sm; image_sm for num_frames None;
    the distillation student with distill_dim).
    """

    def __init__(self, config: VideoMambaConfig) -> None:
        if not config.bimamba and config.readout == "cls":
            raise ValueError(
                f"readout is 'cls'; {BLIND}: all clips would get the same logits; allowed: 'mean', 'last' or 'tokens'"
            )
        super().__init__(config, drop_path_rate=0.1)
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
        self, clip: Float[Tensor, "B C *T H W"], *, ssm_state: ModelState | None = None, return_state: bool = False,
        temporal_pos_offset: int | None = None, temporal_pos_total: int | None = None,
    ) -> Any:  # fmt: skip
        """Logits; with distill_dim also the unit-length features of all tokens, as a `DistillOutput`. With `return_state` a
        pair of that and the state for the next chunk's `ssm_state`.

        A chunk says with `temporal_pos_offset` how many tubelets went before. `temporal_pos_total`: see `embed`. Raises
        ValueError or TypeError for a clip, place or state that does not fit, and for a bidirectional model in chunks.
        """
        before, mean, offset = self._stream(ssm_state, return_state, temporal_pos_offset)
        tokens = self.embed(clip, temporal_pos_offset=offset, temporal_pos_total=temporal_pos_total)
        tokens, state, _ = self.encode(tokens, state=before, return_state=return_state)
        output, mean = self.read(tokens, tokens[:, int(not offset) :], mean)
        return (output, packed([*state, mean] if mean else state, ssm_state)) if return_state else output

    def read(self, tokens: Tensor, patches: Tensor, before: State | None = None) -> tuple[Any, State | None]:
        """What the heads make of normed tokens, of which `patches` are all but CLS, and the running mean to carry on."""
        read, mean = self._read(tokens, patches, before)
        logits = self.head(self.head_drop(read))
        if self.config.distill_dim is None:
            return logits, mean
        return DistillOutput(logits, F.normalize(self.distill_head(tokens), dim=-1)), mean

    def _read(self, tokens: Tensor, patches: Tensor, before: State | None) -> tuple[Tensor, State | None]:
        """What the head for the logits reads, and the running mean to carry on."""
        match self.config.readout:
            case "mean":
                return running_mean(patches, before)
            case "last":
                return patches[:, -1], None
            case "tokens":
                return patches, None
        return tokens[:, 0], None


class ClipDecoder(nn.Module):
    """Student feature to the teacher's space: Linear, LayerNorm, and unit length if clip_norm_type is "l2"."""

    def __init__(self, config: VideoMambaConfig) -> None:
        super().__init__()
        self.head = nn.Linear(config.clip_decoder_embed_dim or config.embed_dim, config.clip_output_dim)
        self.norm = Norm(config.clip_output_dim, kind="layer")
        self.unit = config.clip_norm_type == "l2"

    def forward(self, feature: Tensor) -> Tensor:
        out = self.norm(self.head(feature.to(self.head.weight.dtype)))
        return out / out.norm(dim=-1, keepdim=True) if self.unit else out


class VideoMambaEncoder(Backbone):
    """The encoder of masked pretraining and of video-text models (upstream's PretrainVideoMamba and video_sm pretrain).

    With bimamba=False it streams, as `VideoMamba` does; CLS sees nothing then and no pool_type may use it.
    """

    def __init__(self, config: VideoMambaConfig) -> None:
        if not config.bimamba and config.add_pool_norm and config.pool_type not in ("avg", "last"):
            raise ValueError(
                f"pool_type is {config.pool_type!r}; {BLIND}; allowed: 'avg' (of all tokens so far), 'last', or "
                "add_pool_norm=False for tokens alone"
            )
        super().__init__(config, drop_path_rate=0.0)
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
        keep_temporal: bool = False, *, ssm_state: ModelState | None = None, return_state: bool = False,
        temporal_pos_offset: int | None = None, temporal_pos_total: int | None = None,
    ) -> Any:  # fmt: skip
        """mask (B, L), True where a token of this clip is hidden, CLS (column 0) visible. `use_image`: a clip of one tubelet,
        without temporal position. `keep_temporal`: pool each tubelet by itself; the visible tokens must divide by the tubelets.

        Returns an `EncoderOutput`; with `return_state` a pair of that and the state for the next chunk's `ssm_state`. Tokens,
        aligned features and tubelets' pools of chunks, side by side, are the whole's; `pooled` is of all tokens so far.

        A chunk says with `temporal_pos_offset` how many tubelets went before. `temporal_pos_total`: see `embed`. Raises
        ValueError or TypeError for a clip, mask, place or state that does not fit, and for a bidirectional model in chunks.
        """
        config = self.config
        before, mean, offset = self._stream(ssm_state, return_state, temporal_pos_offset, use_image)
        tokens = self.embed(clip, mask, use_image, temporal_pos_offset=offset, temporal_pos_total=temporal_pos_total)
        tokens, state, features = self.encode(
            tokens, mask, state=before, return_state=return_state, taps=config.student_layers()
        )  # fmt: skip
        span = span_of(clip, config, use_image, offset, temporal_pos_total)
        output, mean = self.read(tokens, features, span, mask, keep_temporal, mean)
        return (output, packed([*state, mean] if mean else state, ssm_state)) if return_state else output

    def read(
        self, tokens: Tensor, features: list[Tensor], span: Span, mask: Tensor | None = None, keep_temporal: bool = False,
        before: State | None = None,
    ) -> tuple[EncoderOutput, State | None]:  # fmt: skip
        """What pooling and the CLIP decoders make of normed tokens and tapped features, and the running mean to carry on."""
        decoded = self._decode(features, mask, span.tokens(self.config.patches)) if features else None
        if not self.config.add_pool_norm:
            return EncoderOutput(tokens, None, decoded), None
        cls, rest = tokens[:, : span.has_cls], tokens[:, span.has_cls :]
        pooled, mean = self._pool(cls, rest, span.tubelets, keep_temporal, before)
        return EncoderOutput(rest, self.pool_norm(pooled), decoded), mean

    def _decode(self, features: list[Tensor], mask: Tensor | None, places: range) -> Tensor:
        """Features (B, V, D) of K layers to (K, B, V, clip_output_dim); each token gets its fixed position first."""
        positions = sincos_positions(places.stop, features[0].shape[-1])[places.start :].to(features[0].device)
        visible = select(positions.expand(features[0].shape[0], -1, -1), mask)
        decoded = [decoder(f + visible.to(f.dtype)) for decoder, f in zip(self.clip_decoder, features, strict=True)]
        return torch.stack(decoded)

    def _pool(
        self, cls: Tensor, rest: Tensor, tubelets: int, keep_temporal: bool, before: State | None
    ) -> tuple[Tensor, State | None]:
        """Pool final-normed tokens by pool_type, and carry the mean on. As upstream, cls_cat_avg with keep_temporal adds like
        cls+avg."""
        kind = self.config.pool_type
        if kind == "cls":
            return cls, None
        if keep_temporal and rest.shape[1] % tubelets:
            raise ValueError(f"keep_temporal: {rest.shape[1]} visible tokens do not divide into {tubelets} equal tubelets")
        parts = rest.unflatten(1, (tubelets if keep_temporal else 1, -1))
        if kind == "last":
            return parts[:, :, -1], None
        average = parts.mean(2)
        if kind == "avg":
            so_far, after = running_mean(rest, before)
            return average if keep_temporal else so_far[:, None], after
        return torch.cat((cls, average), dim=1) if kind == "cls_cat_avg" and not keep_temporal else cls + average, None


def build_videomamba(config: SimpleNamespace | VideoMambaConfig) -> VideoMambaEncoder:
    """The encoder for the `SimpleNamespace(vision_encoder=...)` of the VideoMamba Backbone; any of its fields may be absent.

    As there, pooled features are normed and the CLIP decoder's outputs are not of unit length. `pretrained` names a file
    with this encoder's state_dict (bare, or under "model" or "module"), loaded strictly.
    """
    if not isinstance(config, VideoMambaConfig):
        given = dict(vars(config.vision_encoder))
        known = {f.name for f in fields(VideoMambaConfig)}
        if unknown := sorted(set(given) - known):
            log.warning("build_videomamba ignores the unknown field(s) %s", ", ".join(unknown))
        chosen: dict[str, Any] = {"clip_norm_type": "none"} | {k: v for k, v in given.items() if k in known}
        config = VideoMambaConfig(**chosen)
    model = VideoMambaEncoder(config)
    if config.pretrained:
        weights = torch.load(Path(config.pretrained), map_location="cpu", weights_only=True)
        for wrapper in ("model", "module"):
            weights = weights.get(wrapper, weights)
        model.load_state_dict(weights, strict=True)
    return model
