"""VideoMamba: the classifier, and the encoder of masked pretraining, over the layers of `backbone.py`."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from fused.chunked import video as chunked
from fused.chunked.video import Chunks, Video, apply_per_chunk
from fused.models.videomamba.backbone import Backbone
from fused.models.videomamba.config import VideoMambaConfig, check_config
from fused.models.videomamba.embedding import check_visible, sincos_positions, span_of
from fused.models.videomamba.labels import Labelled
from fused.models.videomamba.streaming import continuation
from fused.models.videomamba.timm_api import TimmClassifier
from fused.modules.norm import Norm
from fused.modules.state import State, States, pack, running_mean
from fused.modules.wrapped import weight_of

_CLS_SEES_NOTHING = "a causal model (bimamba=False) shows CLS, its token 0, nothing of a video"


class EncoderOutput(NamedTuple):
    """The output of `VideoMambaEncoder`."""

    tokens: Tensor  # (B, V, D) final-normed visible tokens; CLS is left out exactly when add_pool_norm
    pooled: Tensor | None  # (B, 1, D); (B, 2, D) for cls_cat_avg; (B, T', D) with keep_temporal; None without add_pool_norm
    clip: Tensor | None  # (K, B, V, clip_output_dim), CLS included; None when clip_return_layer is 0


class DistillOutput(NamedTuple):
    """The output of `VideoMamba` when distill_dim is set."""

    logits: Tensor  # (B, num_classes)
    features: Tensor  # (B, L, distill_dim) of unit length, CLS included


class DistillHead(nn.Sequential):
    """The distillation head: Norm, Linear, unit length."""

    def forward(self, tokens: Tensor, backend: str = "auto") -> Tensor:
        """Return features (B, L, distill_dim) of unit length of normed tokens (B, L, D)."""
        norm, project = self
        return F.normalize(project(norm(tokens, backend)), dim=-1)


class VideoMamba(Labelled, TimmClassifier, Backbone):
    """The classifier: a clip (B, C, T, H, W), or an image (B, C, H, W), to logits (B, num_classes).

    `config.readout` says what the head reads: "cls", as upstream; the "mean" of all patch tokens; the "last" of them; or
    "tokens", every patch token, with logits (B, T'*P, num_classes). With bimamba=False the model can stream (`forward`);
    "mean" and "last" are then of the tokens so far, and "cls" is refused, since CLS is scanned before the video.

    Loads upstream's state_dict: video_sm, image_sm (num_frames None), the distillation student (distill_dim).
    """

    def __init__(self, config: VideoMambaConfig, backend: str = "auto") -> None:
        check_config(config)
        if config.readout == "cls" and not config.bimamba:
            raise ValueError(
                f"readout is 'cls', but {_CLS_SEES_NOTHING}: every clip would have the same logits; "
                "allowed: 'mean', 'last', 'tokens'"
            )
        super().__init__(config, 0.1, backend)
        self.norm_f = self._make_norm()
        self.head = nn.Linear(config.embed_dim, config.num_classes) if config.num_classes else nn.Identity()
        self.head_drop = nn.Dropout(config.fc_drop_rate)
        if config.distill_dim is not None:
            self.distill_head = DistillHead(Norm(config.embed_dim), nn.Linear(config.embed_dim, config.distill_dim))
        self._init_weights()

    @property
    def final_norm(self) -> Norm:
        """The norm after the last layer; its name in the state_dict is upstream's."""
        return self.norm_f

    @property
    def reads_mean(self) -> bool:
        """Whether the state ends with (count, total) of a running mean."""
        return self.config.readout == "mean"

    def forward(
        self, clip: Float[Tensor, "B C *T H W"], *, ssm_state: States | None = None, return_state: bool = False,
        temporal_pos_offset: int | None = None, temporal_pos_total: int | None = None,
    ) -> Any:  # fmt: skip
        """Return logits (B, num_classes), or a `DistillOutput` if distill_dim is set; with `return_state` (that, new state).

        A causal model takes a video in chunks of any number of tubelets. A chunk is passed with the `ssm_state` that the chunk
        before returned, and with `temporal_pos_offset`, the number of tubelets before it. The first chunk is passed with
        neither, or with `init_state(batch_size)` and 0. `temporal_pos_total` is explained at `embed`.

        Raises ValueError or TypeError for arguments that do not fit.
        """
        chunk = continuation(self.config, self.reads_mean, ssm_state, return_state, temporal_pos_offset)
        tokens = self.embed(clip, temporal_pos_offset=chunk.offset, temporal_pos_total=temporal_pos_total)
        output, states, mean = self.forward_tokens(tokens, int(not chunk.offset), chunk.states, chunk.mean, return_state)
        return (output, pack(states, ssm_state, mean)) if return_state else output

    def forward_tokens(
        self, tokens: Tensor, cls: int, states: States | None, mean: State | None, return_state: bool
    ) -> tuple[Tensor | DistillOutput, States | None, State | None]:
        """Return (output, new states of the layers, new running mean) for embedded tokens (B, L, D).

        `cls` is 1 if the first token is CLS, else 0; `states` and `mean` are those of the chunk before, None for zeros.
        """
        out = self.run_layers(tokens, None, tokens.shape[1], states, return_state)
        tokens = self.apply_final_norm(out.hidden, out.residual, out.backend, order=out.order, part=self._read_part())
        read, mean = self.read_tokens(tokens, cls, mean)
        output: Any = self.head(self.head_drop(read))
        if self.config.distill_dim is not None:
            output = DistillOutput(output, self.distill_head(tokens, out.backend))
        return output, out.states, mean

    def forward_chunked(
        self, clip: Video, *, chunk_frames: int, num_frames: int | None = None, offload: bool = False,
        temporal_pos_total: int | None = None,
    ) -> Tensor | DistillOutput:  # fmt: skip
        """Return what `forward` returns, gradients included, in the memory of `chunk_frames` frames.

        `clip` is (B, C, T, H, W), or an iterator of frames (B, C, H, W) or runs of frames (B, C, t, H, W), `num_frames` in
        all; frames (C, H, W), as `fused.io.video.read_frames` yields them, are of one video. T may be less than the model's
        table of temporal positions; `temporal_pos_total` is explained at `embed`. With `offload`, the tensors that a layer's
        first pass stores for its second pass are kept in host memory.

        Raises ValueError or TypeError for arguments that do not fit the model, and for a model that cannot run in chunks.
        """
        out = chunked.run_layers(self, clip, chunk_frames, num_frames, temporal_pos_total, offload)
        tokens = self.apply_final_norm(out.hidden, out.residual, out.backend, part=self._read_part(), chunks=out.chunks)
        output = self.head(self.head_drop(self.read_tokens(tokens, 1, None)[0]))
        if self.config.distill_dim is None:
            return output
        return DistillOutput(output, apply_per_chunk(lambda x: self.distill_head(x, out.backend), out.chunks, tokens))

    def _read_part(self) -> slice:
        """Return the slice of tokens that the heads read; only these are normed. No scan order moves the first or the last."""
        all_tokens = slice(None)
        if self.config.distill_dim is not None:
            return all_tokens
        return {"cls": slice(0, 1), "last": slice(-1, None)}.get(self.config.readout, all_tokens)

    def read_tokens(self, tokens: Tensor, cls: int, before: State | None) -> tuple[Tensor, State | None]:
        """Return the head's input (B, D), or (B, L - cls, D) for readout "tokens", and the new running mean, if one is read.

        `tokens` (B, L, D) are normed, with CLS in front if `cls` is 1; `before` is the running mean of the chunks before.
        """
        match self.config.readout:
            case "mean":
                return running_mean(tokens[:, cls:], before)
            case "tokens":
                return tokens[:, cls:], None
            case "last":
                return tokens[:, -1], None
        return tokens[:, 0], None


class ClipDecoder(nn.Module):
    """The projection of a student's feature to the teacher's space: Linear, LayerNorm, unit length for clip_norm_type "l2"."""

    def __init__(self, config: VideoMambaConfig) -> None:
        super().__init__()
        self.head = nn.Linear(config.clip_decoder_embed_dim or config.embed_dim, config.clip_output_dim)
        self.norm = Norm(config.clip_output_dim, kind="layer")
        self.unit = config.clip_norm_type == "l2"

    def forward(self, feature: Tensor, backend: str = "auto") -> Tensor:
        """Return (B, V, clip_output_dim) for a feature (B, V, D)."""
        out = self.norm(self.head(feature.to(weight_of(self.head).dtype)), backend)
        return out / out.norm(dim=-1, keepdim=True) if self.unit else out


class VideoMambaEncoder(Backbone):
    """The encoder of masked pretraining and video-text models: video_mm's, or with add_pool_norm=False video_sm's.

    With bimamba=False it can stream, like `VideoMamba`, and pooling from CLS is refused.
    """

    def __init__(self, config: VideoMambaConfig, backend: str = "auto") -> None:
        check_config(config)
        if config.add_pool_norm and "cls" in config.pool_type and not config.bimamba:
            raise ValueError(
                f"pool_type is {config.pool_type!r}, but {_CLS_SEES_NOTHING}; allowed: 'avg', of all tokens so far, 'last', "
                "or add_pool_norm=False, which leaves the tokens"
            )
        super().__init__(config, 0.0, backend)
        self.norm = self._make_norm()
        self.clip_decoder = nn.ModuleList(ClipDecoder(config) for _ in range(config.clip_return_layer))
        if config.add_pool_norm:
            self.pool_norm = Norm(config.embed_dim, kind="layer")
        self._init_weights()

    @property
    def final_norm(self) -> Norm:
        """The norm after the last layer; its name in the state_dict is upstream's."""
        return self.norm

    @property
    def reads_mean(self) -> bool:
        """Whether the state ends with (count, total) of a running mean."""
        return self.config.add_pool_norm and self.config.pool_type == "avg"

    def forward(
        self, clip: Float[Tensor, "B C *T H W"], mask: Bool[Tensor, "B L"] | None = None, use_image: bool = False,
        keep_temporal: bool = False, *, visible: Int[Tensor, "B V"] | None = None, ssm_state: States | None = None,
        return_state: bool = False, temporal_pos_offset: int | None = None, temporal_pos_total: int | None = None,
    ) -> Any:  # fmt: skip
        """Return an `EncoderOutput` of the tokens that `mask` leaves visible; with `return_state` the pair (that, new state).

        `mask` is (B, L), True = hidden; CLS, column 0, stays visible. In its place `visible`, int64 (B, V), may hold the
        ascending indices of visible tokens, with 0; its values are not read on the host, so that a CUDA graph can hold a call.
        `use_image`: the clip is one tubelet and gets no temporal position. `keep_temporal`: every tubelet is pooled by itself;
        the number of visible tokens must then be a multiple of the tubelets.

        A causal model takes a video in chunks, by the rules of `VideoMamba.forward`; a chunk's mask is that of its own
        tokens. Tokens, clip features and pooled tubelets, concatenated over all chunks, are those of the whole video. Without
        keep_temporal `pooled` is of all tokens so far. Raises ValueError or TypeError for arguments that do not fit.
        """
        config = self.config
        chunk = continuation(config, self.reads_mean, ssm_state, return_state, temporal_pos_offset, use_image)
        span = span_of(clip, config, use_image, chunk.offset, temporal_pos_total)
        length = span.length(config.patches)
        if visible is None:
            visible = self.visible_indices(clip, mask, span)
        else:
            check_visible(visible, mask, clip.shape[0], length)
        tokens = self.pos_drop(self.embed_span(clip, span, visible, use_image))
        out = self.run_layers(tokens, visible, length, chunk.states, return_state, config.student_layers())
        tokens, mean = self.apply_final_norm(out.hidden, out.residual, out.backend, order=out.order), None
        decoded = self._decode(out.features, visible, length, out.backend, span.first_token(config.patches))
        output = EncoderOutput(tokens, None, decoded)
        if config.add_pool_norm:
            cls, rest = tokens[:, : span.cls], tokens[:, span.cls :]
            pooled, mean = self._pool(cls, rest, span.tubelets if keep_temporal else None, chunk.mean)
            output = EncoderOutput(rest, self.pool_norm(pooled, out.backend), decoded)
        return (output, pack(out.states, ssm_state, mean)) if return_state else output

    def forward_chunked(
        self, clip: Video, *, chunk_frames: int, num_frames: int | None = None, offload: bool = False,
        temporal_pos_total: int | None = None, keep_temporal: bool = False,
    ) -> EncoderOutput:  # fmt: skip
        """Return what `forward` returns without a mask, gradients included, in the memory of `chunk_frames` frames.

        Arguments and errors are those of `VideoMamba.forward_chunked`; `keep_temporal` is that of `forward`.
        """
        config, students = self.config, self.config.student_layers()
        out = chunked.run_layers(self, clip, chunk_frames, num_frames, temporal_pos_total, offload, students)
        tokens = self.apply_final_norm(out.hidden, out.residual, out.backend, chunks=out.chunks)
        decoded = self._decode(out.features, None, tokens.shape[1], out.backend, chunks=out.chunks)
        if not config.add_pool_norm:
            return EncoderOutput(tokens, None, decoded)
        cls, rest = tokens[:, :1], tokens[:, 1:]
        pooled, _ = self._pool(cls, rest, rest.shape[1] // config.patches if keep_temporal else None, None)
        return EncoderOutput(rest, self.pool_norm(pooled, out.backend), decoded)

    def _decode(
        self, features: list[Tensor], visible: Tensor | None, length: int, backend: str, first: int = 0, chunks: Chunks = ()
    ) -> Tensor | None:
        """Return the decoded features (K, B, V, clip_output_dim) of K layers (B, V, D), None for no layers.

        Every token first gets its fixed position: the tokens are those numbered `first` to `first + length - 1` of the video,
        or the `visible` ones of them. With `chunks` they are decoded chunk by chunk.
        """
        if not features:
            return None
        positions = sincos_positions(length, self.config.embed_dim, features[0].device, first)
        positions = positions[None] if visible is None else positions[visible]

        def decode(decoder: nn.Module, feature: Tensor) -> Tensor:
            return apply_per_chunk(lambda x, p: decoder(x + p.to(x.dtype), backend), chunks, feature, positions)

        return torch.stack([decode(decoder, feature) for decoder, feature in zip(self.clip_decoder, features, strict=True)])

    def _pool(self, cls: Tensor, rest: Tensor, tubelets: int | None, before: State | None) -> tuple[Tensor, State | None]:
        """Return the pooled tokens before their norm, and the new running mean, if one is read.

        `cls` is (B, 0 or 1, D), `rest` (B, V, D). The result is (B, 1 or 2, D); with a number of `tubelets` every one of them
        is pooled by itself, (B, tubelets, D), and "cls_cat_avg" adds like "cls+avg", as upstream does.
        """
        kind = self.config.pool_type
        if kind == "cls":
            return cls, None
        if tubelets and rest.shape[1] % tubelets:
            raise ValueError(
                f"keep_temporal is True, and {rest.shape[1]} visible tokens do not divide into {tubelets} equal tubelets; "
                "allowed: a mask that leaves as many in each, or keep_temporal=False"
            )
        split = rest.unflatten(1, (tubelets or 1, -1))
        if kind == "last":
            return split[:, :, -1], None
        if kind == "avg":
            mean, after = running_mean(rest, before)
            return split.mean(dim=2) if tubelets else mean[:, None], after
        average = split.mean(dim=2)
        return torch.cat((cls, average), dim=1) if kind == "cls_cat_avg" and not tubelets else cls + average, None
