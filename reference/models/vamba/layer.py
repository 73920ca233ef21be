"""One decoder layer: text reads itself and the video, then the video passes a Mamba-2 mixer."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from reference.models.vamba.attention import Angles, Attention, KeysAndValues
from reference.models.vamba.config import VambaConfig
from reference.models.vamba.masks import causal_mask, default_positions, read_attention_mask, text_samples
from reference.models.vamba.rotary import rotary_angles
from reference.modules.mamba2 import Mamba2
from reference.modules.norm import Norm


class MLP(nn.Module):
    """The gated feed-forward of Qwen2: down_proj(silu(gate_proj x) up_proj x), without biases."""

    def __init__(self, config: VambaConfig) -> None:
        super().__init__()
        D, F = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(D, F, bias=False)
        self.up_proj = nn.Linear(D, F, bias=False)
        self.down_proj = nn.Linear(F, D, bias=False)

    def forward(self, x: Float[Tensor, "B L D"]) -> Float[Tensor, "B L D"]:
        """Return the feed-forward of each token."""
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class VisionMixer(nn.Module):
    """The residual Mamba-2 block of video tokens: v + mixer(norm(v)), causal in the order of the tokens."""

    def __init__(self, config: VambaConfig, layer_idx: int) -> None:
        super().__init__()
        self.norm = Norm(config.hidden_size, 1e-5)
        self.mixer = Mamba2(config.hidden_size, **dict(config.mixer), layer_idx=layer_idx)

    def forward(self, video: Float[Tensor, "B Lv D"], seq_idx: Int[Tensor, "B Lv"] | None = None) -> Float[Tensor, "B Lv D"]:
        """Return the video tokens after the block; the mixer starts again where `seq_idx` changes. There may be no token."""
        if not video.shape[1]:
            return video
        return video + self.mixer(self.norm(video), seq_idx=seq_idx)


class LayerInputs(NamedTuple):
    """The part that all layers share: the angles of text and of rotated video keys, and who may read what."""

    angles: Angles
    video_angles: Angles | None
    self_mask: Bool[Tensor, "B L M"]
    cross_mask: Bool[Tensor, "B L Lv"] | None
    seq_idx: Int[Tensor, "B Lv"] | None


class VambaDecoderLayer(nn.Module):
    """A decoder layer on two streams, text t (B, L, D) and video v (B, Lv, D).

        h = norm_in(t);  s = self_attn(h);  c = cross_attn(h, v)     with cross_attn_use_layer_norm v = norm_in(v) before
        t = t + alpha s + (1 - alpha) c                              without use_alpha_balancing t + s + c
        t = t + mlp(norm_post(t))
        v = v + mixer(norm_m(v))                                     after the cross-attention has read v

    Every forward clamps the parameter alpha to [0, 1], in place; its gradient is not cut at the borders. Without a video, or
    for a text without video tokens, c is 0: the limit of an attention over nothing, upstream refuses it.
    """

    def __init__(self, config: VambaConfig, layer_idx: int = 0) -> None:
        super().__init__()
        self.config = config
        self.input_layernorm = Norm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.cross_attn = Attention(config)
        if config.use_alpha_balancing:
            self.alpha = nn.Parameter(torch.full((1,), 0.5))
        self.post_attention_layernorm = Norm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)
        self.vision_mixer = VisionMixer(config, layer_idx)

    def forward(
        self,
        text: Float[Tensor, "B L D"],
        video: Float[Tensor, "B Lv D"] | None,
        *,
        position_ids: Int[Tensor, "3 B L"] | None = None,
        attention_mask: Tensor | None = None,
        cross_attention_mask: Bool[Tensor, "B L Lv"] | None = None,
        encoder_position_ids: Int[Tensor, "3 B Lv"] | None = None,
        seq_idx: Int[Tensor, "B Lv"] | None = None,
    ) -> tuple[Float[Tensor, "B L D"], Float[Tensor, "B Lv D"] | None]:
        """Return both streams after the layer.

        Arguments are those of `Vamba`. `seq_idx` numbers the videos of a row, ascending. Without a `cross_attention_mask`
        every text token reads all of them.
        """
        valid, full = read_attention_mask(attention_mask, text, None)
        if position_ids is None:
            position_ids = default_positions(valid, valid.new_zeros(len(valid), dtype=torch.long))
        inputs = LayerInputs(
            self.angles(position_ids),
            None if encoder_position_ids is None else self.angles(encoder_position_ids),
            causal_mask(text_samples(position_ids, valid), valid) if full is None else full,
            cross_attention_mask,
            seq_idx,
        )
        video, video_keys = self.project_video(video, inputs)
        text, _ = self.update_text(text, video_keys, inputs)
        return text, None if video is None else self.vision_mixer(video, seq_idx)

    def angles(self, position_ids: Int[Tensor, "3 B L"]) -> Angles:
        """Return the rotary angles of positions."""
        return rotary_angles(position_ids, tuple(self.config.mrope_section), self.config.rope_theta)

    def project_video(self, video: Tensor | None, inputs: LayerInputs) -> tuple[Tensor | None, KeysAndValues | None]:
        """Return the video stream (B, Lv, D) and its keys and values (B, key heads, Lv, C) for the cross-attention."""
        if video is None:
            return None, None
        if self.config.cross_attn_use_layer_norm:
            video = self.input_layernorm(video)
        if not self.config.cross_attn_use_position_embeddings:
            return video, self.cross_attn.project_keys(video, None)
        if inputs.video_angles is None:
            raise ValueError("encoder_position_ids is None; cross_attn_use_position_embeddings needs the video's positions")
        return video, self.cross_attn.project_keys(video, inputs.video_angles)

    def update_text(
        self, text: Tensor, video_keys: KeysAndValues | None, inputs: LayerInputs, past: KeysAndValues | None = None
    ) -> tuple[Tensor, KeysAndValues]:
        """Return the text stream (B, L, D) after the layer, and keys and values (B, key heads, M, C) of the text so far.

        `past` holds keys and values of the M - L tokens before.
        """
        h = self.input_layernorm(text)
        k, v = self.self_attn.project_keys(h, inputs.angles)
        if past is not None:
            k, v = torch.cat((past[0], k), dim=2), torch.cat((past[1], v), dim=2)
        s = self.self_attn(h, (k, v), inputs.angles, inputs.self_mask)
        c = None
        if video_keys is not None:
            angles = inputs.angles if self.config.cross_attn_use_position_embeddings else None
            c = self.cross_attn(h, video_keys, angles, inputs.cross_mask)
        if self.config.use_alpha_balancing:
            self.alpha.data.clamp_(0, 1)
            s = self.alpha * s
            c = None if c is None else (1 - self.alpha) * c
        text = text + s if c is None else text + s + c
        return text + self.mlp(self.post_attention_layernorm(text)), (k, v)
