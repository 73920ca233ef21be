"""The interface that timm and its training scripts expect of a classifier: head, features, groups of layers."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fused.models.videomamba.config import VideoMambaConfig
from fused.runtime.initial_values import trunc_normal_

_TIMM_POOLS = {"cls": "token", "mean": "avg", "last": "last", "tokens": ""}


class TimmClassifier:
    """timm's conventions for a model with `config`, `head`, `head_drop`, `embed`, `encode` and `read_tokens`."""

    config: VideoMambaConfig
    head: nn.Module
    head_drop: nn.Module
    cls_token: nn.Parameter
    embed: Any
    encode: Any
    read_tokens: Any
    labels: Any

    @property
    def num_classes(self) -> int:
        """The number of classes; 0 without a head."""
        return self.config.num_classes

    @property
    def num_features(self) -> int:
        """The width of the tokens."""
        return self.config.embed_dim

    embed_dim = head_hidden_size = num_features

    def get_classifier(self) -> nn.Module:
        """Return the head: a Linear, or an Identity if num_classes is 0."""
        return self.head

    @torch.no_grad()
    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head by a new one for `num_classes` classes (0: none), on the old one's device; `labels` is then None.

        `global_pool` may only be timm's word for what the head reads now. Raises ValueError for a wrong number, and for
        another pooling.
        """
        pool = _TIMM_POOLS[self.config.readout]
        if global_pool not in (None, pool):
            raise ValueError(f"global_pool is {global_pool!r}; allowed: {pool!r} for readout={self.config.readout!r}, or None")
        self.config = replace(self.config, num_classes=num_classes)
        self.labels = None  # the new head's classes are other ones
        head: nn.Module = nn.Identity()
        if num_classes:
            head = nn.Linear(self.config.embed_dim, num_classes, device=self.cls_token.device, dtype=self.cls_token.dtype)
            trunc_normal_(head.weight, std=0.02)
            nn.init.zeros_(head.bias)
        self.head = head

    def forward_features(self, clip: Tensor) -> Tensor:
        """Return the normed tokens (B, L, D), CLS first, of a clip (B, C, T, H, W) or an image (B, C, H, W)."""
        return self.encode(self.embed(clip))[0]

    def forward_head(self, tokens: Tensor, pre_logits: bool = False) -> Tensor:
        """Return logits (B, num_classes) of a whole clip's tokens (B, L, D), or with `pre_logits` the head's input (B, D)."""
        read = self.head_drop(self.read_tokens(tokens, 1, None)[0])
        return read if pre_logits else self.head(read)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return patterns of parameter names for layer decay: embeddings, every layer, then the heads.

        With `coarse` all layers are one group. timm reads what a pattern captures as the group's number, and 99999 as that of
        the group before, so the final norm goes with the last layer. Names that match no pattern are the last group.
        """
        return {
            "stem": r"^(?:cls_token|pos_embed|temporal_pos_embedding|patch_embed)",
            "blocks": r"^layers" if coarse else [(r"^layers\.(\d+)", None), (r"^norm_f", (99999,))],
        }

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Run every mixer again in the backward pass, which saves memory; with `enable` False run none again."""
        self.config = replace(self.config, use_checkpoint=enable, checkpoint_num=self.config.depth if enable else 0)
        for layer in self.layers:  # type: ignore[attr-defined]
            layer.recompute = enable


class TokenFeatures(nn.Module):
    """A classifier as a feature extractor: a clip to a list of tokens (B, L, D), CLS first, one entry for each of `layers`.

    An entry is the final norm of the residual stream after that layer; negative numbers count from the last layer. Raises
    ValueError for a number out of range.
    """

    def __init__(self, model: Any, layers: tuple[int, ...] = (-1,)) -> None:
        super().__init__()
        depth = model.config.depth
        if not layers or not all(isinstance(i, int) and -depth <= i < depth for i in layers):
            raise ValueError(f"out_indices is {layers!r}; allowed: layers from {-depth} to {depth - 1}")
        self.model, self.layers = model, tuple(i % depth for i in layers)

    def forward(self, clip: Tensor) -> list[Tensor]:
        """Return one tensor (B, L, D) a layer, in the order of `layers`."""
        last = self.model.config.depth - 1
        inner = sorted(set(self.layers) - {last})
        tokens, _, features = self.model.encode(self.model.embed(clip), out_layers=inner)
        found = {**dict(zip(inner, features, strict=True)), last: tokens}
        return [found[layer] for layer in self.layers]
