"""One decoder layer: text reads itself and the video, then the video passes a Mamba-2 mixer."""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from fused import backends
from fused.models.vamba.attention import Attention
from fused.models.vamba.cache import LayerMemory
from fused.models.vamba.config import VambaConfig
from fused.models.vamba.pattern import (
    Pattern,
    causal_pattern,
    default_positions,
    read_attention_mask,
    text_spans,
)
from fused.models.vamba.rotary import Angles, rotary_angles
from fused.modules.mamba2 import Mamba2
from fused.modules.norm import Norm
from fused.modules.state import State
from fused.runtime.dtypes import accumulation_dtype

NO_POSITIONS = "encoder_position_ids is None; cross_attn_use_position_embeddings needs the video's positions (3, B, Lv)"


@dataclass(frozen=True)
class Shared:
    """The part of a call that is the same for all its layers.

    It is no tuple: FSDP, which rounds the tensors in tuples to the dtype of its parameters, would round the angles.
    """

    backend: str
    angles: Angles | None  # of the text
    video_angles: Angles | None
    text_pattern: Pattern
    cross_pattern: Pattern
    seq_idx: Int[Tensor, "B Lv"] | None


class MLP(nn.Module):
    """The gated feed-forward of Qwen2: down_proj(silu(gate_proj x) up_proj x), without biases."""

    def __init__(self, config: VambaConfig) -> None:
        super().__init__()
        D, E = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(D, E, bias=False)
        self.up_proj = nn.Linear(D, E, bias=False)
        self.down_proj = nn.Linear(E, D, bias=False)

    def forward(self, x: Float[Tensor, "B L D"]) -> Float[Tensor, "B L D"]:
        """Return the feed-forward of each token."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class VisionMixer(nn.Module):
    """The residual Mamba-2 block of video tokens, v + mixer(norm(v)), causal in the order of the tokens."""

    def __init__(self, config: VambaConfig, layer_idx: int) -> None:
        super().__init__()
        self.norm = Norm(config.hidden_size, 1e-5)
        self.mixer = Mamba2(config.hidden_size, **dict(config.mixer), layer_idx=layer_idx)

    def forward(
        self,
        video: Float[Tensor, "B Lv D"],
        seq_idx: Int[Tensor, "B Lv"] | None = None,
        backend: str = "auto",
        state: State | None = None,
        return_state: bool = False,
    ) -> tuple[Float[Tensor, "B Lv D"], State | None]:
        """Return the video tokens after the block and, with `return_state`, the mixer's state for the tokens that follow.

        The mixer starts anew where `seq_idx` changes. No tokens stay none.
        """
        if not video.shape[1]:
            return video, state
        normed = self.norm(video, backend)
        options = {"seq_idx": seq_idx, "backend": None if backend == "auto" else backend}
        if state is not None or return_state:
            mixed, state = self.mixer(normed, **options, state=state, return_state=True)
        else:
            mixed = self.mixer(normed, **options)
        if mixed.dtype == video.dtype and not torch.is_grad_enabled():
            return mixed.add_(video), state
        return video + mixed, state


class VambaDecoderLayer(nn.Module):
    """A decoder layer on two streams, text t (B, L, D) and video v (B, Lv, D).

        h = norm_in(t);  s = self_attn(h);  c = cross_attn(h, v)     with cross_attn_use_layer_norm v = norm_in(v) before
        t = t + alpha s + (1 - alpha) c                              without use_alpha_balancing t + s + c
        t = t + mlp(norm_post(t))
        v = v + mixer(norm_m(v))                                     after the cross-attention has read v

    A forward clamps the parameter alpha to [0, 1] in place, as upstream; its gradient is not cut at the borders. Without a
    video, or without video tokens, c is 0.
    """

    def __init__(self, config: VambaConfig, layer_idx: int = 0, *, backend: str = "auto") -> None:
        super().__init__()
        self.config, self.backend = config, backend
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
        text: Float[Tensor, "B L D"] | None,
        video: Float[Tensor, "B Lv D"] | None,
        *,
        position_ids: Int[Tensor, "3 B L"] | None = None,
        attention_mask: Tensor | None = None,
        cross_attention_mask: Bool[Tensor, "B L Lv"] | None = None,
        encoder_position_ids: Int[Tensor, "3 B Lv"] | None = None,
        seq_idx: Int[Tensor, "B Lv"] | None = None,
        shared: Shared | None = None,
        memory: LayerMemory | None = None,
        run_mixer: bool = True,
        stock: bool = False,
    ) -> tuple[Float[Tensor, "B L D"] | None, Float[Tensor, "B Lv D"] | None]:
        """Return both streams after the layer.

        Arguments are those of `Vamba`. `seq_idx` numbers the videos of a row, ascending. Without a `cross_attention_mask`
        every text token reads all of them. A model gives `shared`, which says the same once for all layers, a `memory`, which
        holds what is cached and takes what is new, and leaves out the last mixer: then there is no video after the layer. With
        `stock` text is updated as by a layer of Qwen2-VL: t = t + s.
        """
        if shared is None:
            if text is None:
                raise ValueError("text is None; allowed: the tokens (B, L, D)")
            video_angles = None if encoder_position_ids is None else self.angles(encoder_position_ids, text.dtype)
            cross = Pattern(mask=None if cross_attention_mask is None else cross_attention_mask[:, None])
            plain = self._share(text, position_ids, attention_mask)
            shared = replace(plain, video_angles=video_angles, cross_pattern=cross, seq_idx=seq_idx)
        memory = memory or LayerMemory()
        if video is not None:
            video = self.read_video(video, shared, memory)
        if text is not None:
            text = self._update_text(text, shared, memory, stock)
        if video is None or not run_mixer:
            return text, None
        return text, self.vision_mixer(video, shared.seq_idx, shared.backend)[0]

    def _share(self, text: Tensor, position_ids: Tensor | None, attention_mask: Tensor | None) -> Shared:
        """Return what a call without a video shares."""
        valid, mask = read_attention_mask(attention_mask, text, None)
        backend = backends.choose(self.backend, text.device)
        if position_ids is None:
            some = torch.ones(text.shape[:2], dtype=torch.bool, device=text.device) if valid is None else valid
            position_ids = default_positions(some, some.new_zeros(len(some), dtype=torch.long))
        pattern = Pattern(mask=mask) if mask is not None else None
        pattern = pattern or causal_pattern(text_spans(position_ids, valid), text.shape[1], valid)
        return Shared(backend, self.angles(position_ids, text.dtype), None, pattern, Pattern(), None)

    def angles(self, position_ids: Int[Tensor, "3 B L"], dtype: torch.dtype) -> Angles:
        """Return the rotary angles of positions, for a stream of a dtype."""
        config = self.config
        return rotary_angles(position_ids, tuple(config.mrope_section), config.rope_theta, accumulation_dtype(dtype))

    def read_video(self, video: Float[Tensor, "B Lv D"], shared: Shared, memory: LayerMemory) -> Float[Tensor, "B Lv D"]:
        """Put keys and values of the video into the memory, and return the stream that the mixer gets."""
        if self.config.cross_attn_use_layer_norm:
            video = self.input_layernorm(video, shared.backend)
        angles = None
        if self.config.cross_attn_use_position_embeddings:
            angles = shared.video_angles
            if angles is None:
                raise ValueError(NO_POSITIONS)
        memory.video = self.cross_attn.project_keys(video, angles, shared.backend)
        return video

    def _update_text(self, text: Tensor, shared: Shared, memory: LayerMemory, stock: bool) -> Tensor:
        """Return the text stream (B, L, D) after the layer."""
        h = self.input_layernorm(text, shared.backend)
        pair = memory.extend(*self.self_attn.project_keys(h, shared.angles, shared.backend))
        s = self.self_attn(h, pair, shared.angles, shared.text_pattern, shared.backend)
        c = None
        if memory.video is not None:
            angles = shared.angles if self.config.cross_attn_use_position_embeddings else None
            c = self.cross_attn(h, memory.video, angles, shared.cross_pattern, shared.backend)
        if self.config.use_alpha_balancing and not stock:
            update = self.balance(s, c)
        else:
            update = s if c is None else s + c
        h, text = self.post_attention_layernorm(update, shared.backend, text, prenorm=True, residual_in_fp32=False)
        return text + self.mlp(h)

    def balance(self, s: Tensor, c: Tensor | None) -> Tensor:
        """Return alpha s + (1 - alpha) c, with alpha clamped, rounded once.

        It is summed in at least float32, also alpha's gradient: one number for all tokens, in which s and c nearly cancel.
        """
        alpha: Tensor = self.alpha
        if self.training or torch.is_grad_enabled():
            alpha.data.clamp_(0, 1)  # not seen by autograd, so that several forwards may precede a backward
            alpha = alpha + (alpha.clamp(0, 1) - alpha).detach()  # a copy, such as that of a sharded parameter, is clamped too
        else:
            alpha = alpha.clamp(0, 1)
        if s.dtype == alpha.dtype and not torch.is_grad_enabled():
            return alpha * s if c is None else torch.lerp(c, s, alpha)
        precise = accumulation_dtype(s.dtype)
        weight = alpha.to(precise)
        update = weight * s.to(precise)
        if c is not None:
            update = update + (1 - weight) * c.to(precise)
        return update.to(torch.promote_types(s.dtype, alpha.dtype))
