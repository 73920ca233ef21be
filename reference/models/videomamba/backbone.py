"""The common part of the two models in `model.py`: embedding, positions, blocks, final norm, and streaming in chunks."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from reference.models.videomamba.block import Block
from reference.models.videomamba.config import VideoMambaConfig
from reference.models.videomamba.embedding import PatchEmbed, check_mask, select_visible, span_of, temporal_positions
from reference.models.videomamba.scan_order import temporal_order
from reference.modules.mamba import Mamba
from reference.modules.norm import DropPath, Norm
from reference.modules.state import ModelState, State, pack_state, unpack_state, zero_mean_state


class Backbone(nn.Module):
    """Base class of the two models: it turns a clip into tokens and tokens into normed tokens. The models add their heads.

    CLS is token 0, patch p of tubelet f is token 1 + f*P + p. `drop_path_rate` is used where the configuration has None.
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

    @property
    def reads_mean(self) -> bool:
        """Whether the model reads a mean over the tokens so far; its count and sum then belong to the state."""
        raise NotImplementedError

    def make_final_norm(self) -> Norm:
        """Return a new norm of the kind that the configuration names."""
        return Norm(self.config.embed_dim, self.config.norm_epsilon, "rms" if self.config.rms_norm else "layer")

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw upstream's effective initial values. Every Linear is redrawn, so delta starts at softplus(0) = 0.69."""
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
        """Return the names of the parameters that upstream's optimisers do not decay, besides biases and vectors."""
        return {"pos_embed", "cls_token", "temporal_pos_embedding"} & {name for name, _ in self.named_parameters()}

    def embed(
        self, clip: Float[Tensor, "B C *T H W"], mask: Bool[Tensor, "B L"] | None = None, use_image: bool = False, *,
        temporal_pos_offset: int | None = None, temporal_pos_total: int | None = None,
    ) -> Float[Tensor, "B V D"]:  # fmt: skip
        """Return the visible tokens (B, V, D) of a clip (B, C, T, H, W) or image (B, C, H, W), CLS first:

            X[0] = cls + pos[0]
            X[1 + f*P + p] = patch(f, p) + pos[1 + p] + temporal[f]

        mask (B, L) bool is True where a token of this clip is hidden. With `temporal_pos_offset` the clip is a chunk of a
        video: any number of whole tubelets, of which the first has this index. The chunks' tokens, side by side, are those of
        the whole video; CLS is among those of the chunk with offset 0. `temporal_pos_total` is the length of the whole video in
        tubelets. The temporal table is stretched to it (`temporal_positions`), the same for every chunk. By default it is the
        table's length, and nothing is stretched. `use_image` takes a clip of one tubelet and adds no temporal position.

        Raise ValueError for a clip or mask of another shape and for a chunk that is not part of the video, TypeError for a clip
        of another dtype.
        """
        span = span_of(clip, self.config, use_image, temporal_pos_offset, temporal_pos_total)
        tokens = self.patch_embed(clip) + self.pos_embed[:, None, 1:]
        if self.config.num_frames is not None and not use_image:
            tokens = tokens + temporal_positions(self.temporal_pos_embedding, span)[:, :, None]
        tokens = tokens.flatten(1, 2)
        if span.has_cls:
            cls = (self.cls_token + self.pos_embed[:, :1]).expand(clip.shape[0], -1, -1)
            tokens = torch.cat((cls, tokens), dim=1)
        tokens = self.pos_drop(tokens)
        if mask is not None:
            check_mask(mask, tokens.shape[0], tokens.shape[1], span.has_cls)
        return select_visible(tokens, mask)

    def init_state(
        self, batch_size: int, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> list[State]:
        """Return the state before a video; `reference.modules.state` describes its contents.

        The default dtype is that of the parameters, under autocast that of autocast. The default device is that of the
        parameters. Raise ValueError for a bidirectional model or a batch size below 1, TypeError for an integer dtype.
        """
        mixers = [module for module in self.modules() if isinstance(module, Mamba)]
        state = [mixer.init_state(batch_size, dtype, device) for mixer in mixers]
        return [*state, zero_mean_state(state[0], self.config.embed_dim)] if self.reads_mean else state

    def encode(
        self, tokens: Float[Tensor, "B V D"], mask: Bool[Tensor, "B L"] | None = None, *,
        state: ModelState | None = None, return_state: bool = False, out_layers: Sequence[int] = (),
    ) -> tuple[Tensor, Any, list[Tensor]]:  # fmt: skip
        """Run the blocks and the final norm over embedded tokens (B, V, D).

        `mask` is that of `embed`. `state` has one (conv_state, ssm_state) per layer. It continues a token sequence, which may
        be cut anywhere; this needs a causal model in spatial order. `out_layers` are the indices of layers whose features are
        returned, ascending. The feature of a layer is the final norm of the residual stream after it. That of the last layer is
        upstream's, the residual stream without the norm (`finish`).

        Return (normed tokens (B, V, D) in storage order, new state in the same kind of container or None, features). Raise
        ValueError or TypeError for a state that does not fit.
        """
        config, carried = self.config, state is not None or return_state
        if carried and config.scan_order != "spatial":
            raise ValueError(f"scan_order is {config.scan_order!r}; a state can only be carried in 'spatial' order")
        before: list[Any] = [None] * config.depth if state is None else unpack_state(state, config.depth)
        order = None if config.scan_order == "spatial" else self._temporal_order(tokens, mask)

        hidden, states, features = tokens, [], []
        residual: Any = None
        for i, layer in enumerate(self.layers):
            hidden, residual, new = layer(hidden, residual, order, before[i], return_state)
            states.append(new)
            if i - 1 in out_layers:
                features.append(self.layer_feature(residual))
        normed, last_feature = self.finish(self.drop_path(hidden), residual)
        if config.depth - 1 in out_layers:
            features.append(last_feature)
        return normed, pack_state(states, state) if carried else None, features

    def layer_feature(self, residual: Tensor) -> Tensor:
        """Return the final norm of a residual stream (B, L, D): the feature of every layer but the last."""
        return self.final_norm(residual.to(self.final_norm.weight.dtype))

    def finish(self, hidden: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Return the normed tokens and the feature of the last layer, both (B, L, D), from the last mixer's output `hidden`.

        Upstream's feature of the last layer is the residual stream: with `fused_add_norm` without `hidden`, otherwise with it.
        """
        fused, fp32 = self.config.fused_add_norm, self.config.residual_in_fp32
        normed, total = self.final_norm.add(hidden, residual, fused_add_norm=fused, residual_in_fp32=fp32)
        return normed, residual if fused else total

    def split_stream_state(
        self, ssm_state: ModelState | None, return_state: bool, offset: int | None, use_image: bool = False
    ) -> tuple[Any, State | None, int | None]:
        """Return (states of the layers, running mean, offset of the chunk) of a forward call; offset is None for a whole video.

        Raise ValueError where the model cannot stream or the arguments do not belong together, TypeError for another type.
        """
        if ssm_state is None and not return_state and offset is None:
            return None, None, None
        if use_image or self.config.num_frames is None:
            raise ValueError(
                "an image is no chunk of a video: ssm_state, return_state and temporal_pos_offset are for videos; to stream "
                "single frames pass each as a clip (B, C, kernel_size, H, W), without use_image"
            )
        if self.config.bimamba:
            raise ValueError(
                "a bidirectional model cannot stream: its backward direction starts at the end of the video, so that every "
                "chunk would need the future. Run the whole clip at once, or build the model with bimamba=False"
            )
        if ssm_state is None:
            if offset:
                raise ValueError(
                    f"temporal_pos_offset is {offset} and ssm_state is None: pass the state that the chunk before returned, or "
                    "init_state(batch_size) to begin in mid-video as if there had been nothing"
                )
            return None, None, 0
        if offset is None:
            raise ValueError(
                "temporal_pos_offset is None with an ssm_state; allowed: the number of tubelets that went before, 0 where "
                "init_state begins a video"
            )
        pairs = unpack_state(ssm_state, self.config.depth, self.reads_mean, "ssm_state")
        return pairs[: self.config.depth], pairs[-1] if self.reads_mean else None, offset

    def _temporal_order(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        """Return the temporal order of tokens (B, V, D): CLS and whole frames, or those of them that a mask leaves."""
        length, patches = tokens.shape[1] if mask is None else mask.shape[1], self.config.patches
        if (length - 1) % patches:
            raise ValueError(f"tokens are {length}; allowed: CLS and frames of {patches} patches, or the mask that left these")
        return temporal_order((length - 1) // patches, patches, None if mask is None else ~mask, tokens.device)
