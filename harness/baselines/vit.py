"""A vision transformer for images and, with joint space-time attention, for clips: the baseline of VideoMamba.

The model is ViT (Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words") with timm's names for its parameters, so that
an image model takes the state_dict of timm's vit_{tiny,small,base}_patch16_224. A clip is one sequence of all patches of
all frames. Figure 1 of the VideoMamba paper (Li et al. 2024, "VideoMamba: State Space Model for Efficient Video
Understanding") times VideoMamba-Ti against such a model, ViT-Ti with naive attention. Positions are VideoMamba's: both
models read the same tokens in the same order.

One letter, one meaning: B clips, T frames, S pixels of a side, P pixels of a patch's side, L tokens, D model width.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from harness.baselines.attention import KINDS, attend, only

COLOURS = 3
EXPANSION = 4  # of the MLP


@dataclass(frozen=True, kw_only=True)
class ViTConfig:
    """The configuration of a ViT; `num_frames=None` is the image model. Raises ValueError saying what is allowed."""

    img_size: int = 224
    patch_size: int = 16
    num_frames: int | None = 8
    num_classes: int = 1000
    embed_dim: int
    depth: int
    num_heads: int
    attention: str = "sdpa"  # one of `harness.baselines.attention`

    def __post_init__(self) -> None:
        for name in ("img_size", "patch_size", "num_classes", "embed_dim", "depth", "num_heads"):
            _require(name, getattr(self, name), _positive(getattr(self, name)), "a positive integer")
        frames = self.num_frames
        _require("num_frames", frames, frames is None or _positive(frames), "a positive integer, or None for images")
        multiple = f"a multiple of patch_size ({self.patch_size})"
        _require("img_size", self.img_size, self.img_size % self.patch_size == 0, multiple)
        divisor = f"a divisor of embed_dim ({self.embed_dim})"
        _require("num_heads", self.num_heads, self.embed_dim % self.num_heads == 0, divisor)
        _require("attention", self.attention, self.attention in KINDS, "one of " + ", ".join(KINDS))

    @property
    def patches(self) -> int:
        """Return the number of patches in one frame."""
        return (self.img_size // self.patch_size) ** 2

    @property
    def tokens(self) -> int:
        """Return the number of tokens of one clip, the class token included."""
        return 1 + (self.num_frames or 1) * self.patches

    @classmethod
    def tiny(cls, **overrides: Any) -> "ViTConfig":
        """Return ViT-Ti, 5.7 M parameters."""
        return cls(**{"embed_dim": 192, "depth": 12, "num_heads": 3, **overrides})

    @classmethod
    def small(cls, **overrides: Any) -> "ViTConfig":
        """Return ViT-S, 22 M parameters."""
        return cls(**{"embed_dim": 384, "depth": 12, "num_heads": 6, **overrides})

    @classmethod
    def base(cls, **overrides: Any) -> "ViTConfig":
        """Return ViT-B, 87 M parameters."""
        return cls(**{"embed_dim": 768, "depth": 12, "num_heads": 12, **overrides})


def _positive(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _require(name: str, value: object, holds: bool, allowed: str) -> None:
    if not holds:
        raise ValueError(f"{name} is {value!r}; allowed: {allowed}")


class PatchEmbed(nn.Module):
    """The patch embedding: every frame in P x P patches, each projected to the model width.

    `proj` is timm's convolution and only holds its parameters: one matmul over the pixels laid out in rows does the
    same and is repeatable bit for bit, as in `fused.models.videomamba.embedding`.
    """

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.patch = config.patch_size
        self.proj = nn.Conv2d(COLOURS, config.embed_dim, self.patch, self.patch)

    def forward(self, clip: Float[Tensor, "B 3 T S S"]) -> Float[Tensor, "B patches D"]:
        """Return patches frame after frame, row after row."""
        P = self.patch
        pixels = clip.unflatten(4, (-1, P)).unflatten(3, (-1, P)).permute(0, 2, 3, 5, 1, 4, 6)  # B T row column 3 P P
        return F.linear(pixels.flatten(4).flatten(1, 3), self.proj.weight.flatten(1), self.proj.bias)


class Attention(nn.Module):
    """Attention of every token to all tokens of its clip, in `num_heads` heads of D / num_heads channels."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.heads, self.kind = config.num_heads, config.attention
        self.qkv = nn.Linear(config.embed_dim, 3 * config.embed_dim)
        self.proj = nn.Linear(config.embed_dim, config.embed_dim)

    def forward(self, x: Float[Tensor, "B L D"]) -> Float[Tensor, "B L D"]:
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each B heads L d
        return self.proj(attend(q, k, v, self.kind).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """fc2(gelu(fc1(x))), with the exact GELU."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.embed_dim, EXPANSION * config.embed_dim)
        self.fc2 = nn.Linear(EXPANSION * config.embed_dim, config.embed_dim)

    def forward(self, x: Float[Tensor, "B L D"]) -> Float[Tensor, "B L D"]:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """x += attn(norm1(x)); x += mlp(norm2(x))."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(config.embed_dim, eps=1e-6) for _ in range(2))
        self.attn, self.mlp = Attention(config), Mlp(config)

    def forward(self, x: Float[Tensor, "B L D"]) -> Float[Tensor, "B L D"]:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """The classifier: a clip (B, 3, T, S, S), or an image (B, 3, S, S), to logits (B, num_classes) read from token 0."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        D = config.embed_dim
        self.patch_embed = PatchEmbed(config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, D))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + config.patches, D))
        if config.num_frames is not None:
            self.temporal_pos_embedding = nn.Parameter(torch.zeros(1, config.num_frames, D))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(D, eps=1e-6)
        self.head = nn.Linear(D, config.num_classes)
        self._init_weights()

    @torch.no_grad()
    def _init_weights(self) -> None:
        """Set timm's initial values; the patch embedding keeps a convolution's."""
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.normal_(self.cls_token, std=1e-6)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def embed(self, clip: Float[Tensor, "B 3 *T S S"]) -> Float[Tensor, "B L D"]:
        """Return tokens with positions, as VideoMamba's: cls + pos[0], then patch(f, p) + pos[1 + p] + temporal[f]."""
        self._check(clip)
        positions = self.pos_embed[0, 1:]
        if self.config.num_frames is not None:
            positions = (self.temporal_pos_embedding[0, :, None] + positions).flatten(0, 1)
        patches = self.patch_embed(clip if clip.dim() == 5 else clip.unsqueeze(2)) + positions
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(clip.shape[0], -1, -1)
        return torch.cat((cls, patches), dim=1)

    def encode(self, tokens: Float[Tensor, "B L D"]) -> Float[Tensor, "B L D"]:
        """Return the result of all blocks on embedded tokens, before the final norm.

        Raises BackendError for an attention that cannot run on their device.
        """
        with only(self.config.attention, tokens.device):
            for block in self.blocks:
                tokens = block(tokens)
        return tokens

    def forward(self, clip: Float[Tensor, "B 3 *T S S"]) -> Float[Tensor, "B classes"]:
        """Return logits. Raises ValueError or TypeError for a clip of another size, BackendError as `encode`."""
        return self.head(self.norm(self.encode(self.embed(clip))[:, 0]))

    def _check(self, clip: Tensor) -> None:
        side, frames = self.config.img_size, self.config.num_frames
        wanted = (COLOURS, side, side) if frames is None else (COLOURS, frames, side, side)
        if tuple(clip.shape[1:]) != wanted:
            numbers = ", ".join(map(str, wanted))
            raise ValueError(f"clip has shape {tuple(clip.shape)}; this model takes (B, {numbers})")
        if not clip.is_floating_point():
            raise TypeError(f"clip has dtype {clip.dtype}; allowed are floating-point dtypes, normalised as in training")
