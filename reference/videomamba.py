"""VideoMamba: the classifier and the masked-pretraining encoder over one stack of bidirectional Mamba blocks."""

import logging
import math
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from reference.block import Block, DropPath, Norm
from reference.config import VideoMambaConfig
from reference.mixer import Mamba, State
from reference.orders import temporal_order
from reference.tokens import PatchEmbed, check_clip, check_mask, select, sincos_positions

log = logging.getLogger("reference")


class EncoderOutput(NamedTuple):
    """What `VideoMambaEncoder` returns."""

    tokens: Tensor  # (B, V, D) final-normed visible tokens; without CLS exactly when add_pool_norm
    pooled: Tensor | None  # (B, 1, D), (B, 2, D) for cls_cat_avg, (B, T', D) with keep_temporal; None without add_pool_norm
    clip: Tensor | None  # (K, B, V+CLS, clip_output_dim), None when clip_return_layer is 0


class DistillOutput(NamedTuple):
    """What `VideoMamba` returns when distill_dim is set."""

    logits: Tensor  # (B, num_classes)
    features: Tensor  # (B, L, distill_dim), unit length, CLS included


class Backbone(nn.Module):
    """Tokens in, tokens out: embedding, positions, blocks. The two models below differ in what they read from it.

    CLS is token 0, patch p of tubelet f is token 1 + f*P + p. A clip's T' tubelets must be those of the temporal table.
    """

    def __init__(self, config: VideoMambaConfig, drop_path_rate: float) -> None:
        super().__init__()
        self.config = config
        D, rate = config.embed_dim, config.drop_path_rate if config.drop_path_rate is not None else drop_path_rate
        self.patch_embed = PatchEmbed(config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, D))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + config.patches, D))
        if config.num_frames is not None:
            self.temporal_pos_embedding = nn.Parameter(torch.zeros(1, config.tubelets, D))
        self.pos_drop = nn.Dropout(config.drop_rate)
        rates = [rate * max(i - 1, 0) / max(config.depth - 1, 1) for i in range(config.depth)]  # upstream's: 0, 0, ...
        self.layers = nn.ModuleList(Block(config, i, rates[i]) for i in range(config.depth))
        self.drop_path = DropPath(rate)

    @property
    def final_norm(self) -> Norm:
        """The norm after the last block."""
        raise NotImplementedError

    def _final_norm(self) -> Norm:
        return Norm(self.config.embed_dim, self.config.norm_epsilon, "rms" if self.config.rms_norm else "layer")

    @torch.no_grad()
    def _init_weights(self) -> None:
        """Upstream's effective initial values. Every Linear is redrawn; so delta starts at softplus(0) = 0.69."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, Mamba):
                nn.init.kaiming_uniform_(module.out_proj.weight, a=math.sqrt(5))
                module.out_proj.weight /= math.sqrt(self.config.depth)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that upstream's optimisers do not decay (besides biases and vectors)."""
        return {"pos_embed", "cls_token", "temporal_pos_embedding"} & {name for name, _ in self.named_parameters()}

    def embed(
        self, clip: Float[Tensor, "B C *T H W"], mask: Bool[Tensor, "B L"] | None = None, use_image: bool = False
    ) -> Float[Tensor, "B V D"]:
        """Visible tokens, CLS first: X[0] = cls + pos[0]; X[1 + f*P + p] = patch(f, p) + pos[1 + p] + temporal[f].

        `use_image` takes a clip of one tubelet without its temporal position. Raises ValueError for a clip or mask of
        another shape.
        """
        check_clip(clip, self.config, use_image)
        patches = self.patch_embed(clip) + self.pos_embed[:, None, 1:]
        if self.config.num_frames is not None and not use_image:
            patches = patches + self.temporal_pos_embedding[:, :, None]
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(clip.shape[0], -1, -1)
        tokens = self.pos_drop(torch.cat((cls, patches.flatten(1, 2)), dim=1))
        if mask is not None:
            check_mask(mask, *tokens.shape[:2])
        return select(tokens, mask)

    def encode(
        self, tokens: Float[Tensor, "B V D"], mask: Bool[Tensor, "B L"] | None = None, *,
        state: Sequence[State] | None = None, return_state: bool = False, taps: Sequence[int] = (),
    ) -> tuple[Tensor, list[State] | None, list[Tensor]]:  # fmt: skip
        """Run the blocks and the final norm over embedded tokens.

        `state` has one (conv_state, ssm_state) per layer; it continues a token sequence that was cut (causal models in spatial
        order only). `taps` names layers whose output is returned, ascending: final-norm(output), but for the last layer the raw
        residual stream: upstream's feature, which leaves out the last mixer when fused_add_norm, and has it otherwise.

        Returns (normed tokens in storage order, new state or None, tapped features).
        """
        config, carried = self.config, state is not None or return_state
        if carried and config.scan_order != "spatial":
            raise ValueError(f"scan_order is {config.scan_order!r}; a state can only be carried in 'spatial' order")
        if state is not None and len(state) != config.depth:
            raise ValueError(f"state has {len(state)} entries; allowed: one per layer ({config.depth})")
        order = None if config.scan_order == "spatial" else self._order(tokens, mask)

        hidden, states, features = tokens, [], []
        residual: Any = None
        for i, layer in enumerate(self.layers):
            hidden, residual, new = layer(hidden, residual, order, state[i] if state is not None else None, return_state)
            states.append(new)
            if i - 1 in taps:
                features.append(self.final_norm(residual.to(self.final_norm.weight.dtype)))
        hidden = self.drop_path(hidden)
        if config.fused_add_norm:
            last = residual
            hidden = self.final_norm.add(hidden, residual, prenorm=False)
        else:
            last = residual + hidden
            hidden = self.final_norm(last.to(self.final_norm.weight.dtype))
        if config.depth - 1 in taps:
            features.append(last)
        return hidden, states if carried else None, features

    def _order(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        """The temporal walk of these tokens: of CLS and whole frames, or of what a mask has left of them."""
        length, patches = tokens.shape[1] if mask is None else mask.shape[1], self.config.patches
        if (length - 1) % patches:
            raise ValueError(f"{length} tokens are not CLS and frames of {patches} patches; pass the mask that left them")
        return temporal_order((length - 1) // patches, patches, None if mask is None else ~mask, tokens.device)


class VideoMamba(Backbone):
    """The classifier: clip (B, C, T, H, W), or image (B, C, H, W), to logits (B, num_classes), read from CLS.

    Its state_dict is upstream's (video_sm; image_sm for num_frames None; the distillation student with distill_dim).
    """

    def __init__(self, config: VideoMambaConfig) -> None:
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

    def forward(self, clip: Float[Tensor, "B C *T H W"]) -> Tensor | DistillOutput:
        """Logits (B, num_classes); with distill_dim also the unit-length features of all tokens, as a `DistillOutput`."""
        return self.read(self.encode(self.embed(clip))[0])

    def read(self, tokens: Float[Tensor, "B L D"]) -> Tensor | DistillOutput:
        """What the heads make of normed tokens."""
        logits = self.head(self.head_drop(tokens[:, 0]))
        if self.config.distill_dim is None:
            return logits
        return DistillOutput(logits, F.normalize(self.distill_head(tokens), dim=-1))


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
    """The encoder of masked pretraining and of video-text models (upstream's PretrainVideoMamba and video_sm pretrain)."""

    def __init__(self, config: VideoMambaConfig) -> None:
        super().__init__(config, drop_path_rate=0.0)
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
        """mask (B, L), True where a token is hidden, CLS (column 0) visible. `use_image`: a clip of one tubelet, without
        temporal position. `keep_temporal`: pool each tubelet by itself; the visible tokens must divide by the tubelets.

        Raises ValueError for a clip or mask of another shape.
        """
        tokens = self.embed(clip, mask, use_image)
        tokens, _, features = self.encode(tokens, mask, taps=self.config.student_layers())
        return self.read(tokens, features, mask, use_image, keep_temporal)

    def read(
        self, tokens: Float[Tensor, "B V D"], features: list[Tensor], mask: Bool[Tensor, "B L"] | None = None,
        use_image: bool = False, keep_temporal: bool = False,
    ) -> EncoderOutput:  # fmt: skip
        """What pooling and the CLIP decoders make of normed tokens and tapped features."""
        length = 1 + self.config.patches * (1 if use_image else self.config.tubelets)
        return EncoderOutput(
            tokens[:, 1:] if self.config.add_pool_norm else tokens,
            self._pool(tokens, (length - 1) // self.config.patches, keep_temporal) if self.config.add_pool_norm else None,
            self._decode(features, mask, length) if features else None,
        )

    def _decode(self, features: list[Tensor], mask: Tensor | None, length: int) -> Tensor:
        """Features (B, V, D) of K layers to (K, B, V, clip_output_dim); each token gets its fixed position first."""
        positions = sincos_positions(length, features[0].shape[-1]).to(features[0].device)
        visible = select(positions.expand(features[0].shape[0], -1, -1), mask)
        decoded = [decoder(f + visible.to(f.dtype)) for decoder, f in zip(self.clip_decoder, features, strict=True)]
        return torch.stack(decoded)

    def _pool(self, tokens: Tensor, tubelets: int, keep_temporal: bool) -> Tensor:
        """Pool final-normed tokens, CLS first, by pool_type. As upstream, cls_cat_avg with keep_temporal adds like cls+avg."""
        cls, rest, kind = tokens[:, :1], tokens[:, 1:], self.config.pool_type
        if kind == "cls":
            return self.pool_norm(cls)
        if keep_temporal and rest.shape[1] % tubelets:
            raise ValueError(f"keep_temporal: {rest.shape[1]} visible tokens do not divide into {tubelets} equal tubelets")
        average = rest.unflatten(1, (tubelets if keep_temporal else 1, -1)).mean(2)
        if kind == "avg":
            return self.pool_norm(average)
        if kind == "cls_cat_avg" and not keep_temporal:
            return self.pool_norm(torch.cat((cls, average), dim=1))
        return self.pool_norm(cls + average)


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
