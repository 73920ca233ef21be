"""From pixels to tokens: tubelet patches, positions, and the teacher's positions for the CLIP decoder."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from reference.config import VideoMambaConfig


class PatchEmbed(nn.Module):
    """Cut a clip into tubelets of kernel_size x P x P pixels and project each to the model width, by one strided convolution.

    `proj` is upstream's Conv3d (D, C, t, P, P), or Conv2d (D, C, P, P) for images.
    """

    def __init__(self, config: VideoMambaConfig) -> None:
        super().__init__()
        P, t = config.patch_size, config.kernel_size
        step = config.stride or P
        self.proj: nn.Conv2d | nn.Conv3d
        if config.num_frames is None:
            self.proj = nn.Conv2d(config.channels, config.embed_dim, P, step)
        else:
            self.proj = nn.Conv3d(config.channels, config.embed_dim, (t, P, P), (t, step, step))

    def forward(self, clip: Float[Tensor, "B C *T H W"]) -> Float[Tensor, "B t P D"]:
        """Clip (B, C, T, H, W), or image (B, C, H, W), to patches (B, tubelets, patches of a frame in row order, D)."""
        grid = self.proj(clip)
        if grid.dim() == 4:
            grid = grid.unsqueeze(2)
        return grid.flatten(3).permute(0, 2, 3, 1)


def check_clip(clip: Tensor, config: VideoMambaConfig, use_image: bool) -> None:
    """Raise ValueError unless the clip is what the model was built for."""
    size: tuple[int, ...] = (config.channels, *config.sides)
    if config.num_frames is not None:
        size = (config.channels, config.kernel_size if use_image else config.num_frames, *config.sides)
    if tuple(clip.shape[1:]) != size:
        layout = "(B, C, H, W)" if config.num_frames is None else "(B, C, T, H, W)"
        raise ValueError(f"clip has shape {tuple(clip.shape)}; this model takes {layout} = (B, {', '.join(map(str, size))})")
    if not clip.is_floating_point():
        raise TypeError(f"clip has dtype {clip.dtype}; allowed are floating-point dtypes, normalised as in training")


def check_mask(mask: Tensor, clips: int, length: int) -> None:
    """Raise ValueError unless a mask (B, L), True where a token is hidden, keeps CLS and as many tokens in every clip."""
    if mask.dtype != torch.bool or tuple(mask.shape) != (clips, length):
        raise ValueError(f"mask is {mask.dtype} {tuple(mask.shape)}; allowed is bool ({clips}, {length}), True = hidden")
    if bool(mask[:, 0].any()):
        raise ValueError("mask hides CLS (column 0); it must stay visible")
    visible = (~mask).sum(1)
    if int(visible.min()) != int(visible.max()):
        raise ValueError(f"mask leaves between {int(visible.min())} and {int(visible.max())} tokens; every clip needs as many")


def select(tokens: Float[Tensor, "B L D"], mask: Bool[Tensor, "B L"] | None) -> Float[Tensor, "B V D"]:
    """The tokens that the mask leaves visible."""
    return tokens if mask is None else tokens[~mask].view(tokens.shape[0], -1, tokens.shape[2])


def sincos_positions(rows: int, dim: int) -> Float[Tensor, "rows dim"]:
    """Fixed positions of the CLIP decoder, row 0 for CLS: sin (even j) and cos (odd j) of row / 10000^(2 floor(j/2) / dim)."""
    j = torch.arange(dim, dtype=torch.float64)
    angle = torch.arange(rows, dtype=torch.float64)[:, None] / 10000 ** (2 * (j // 2) / dim)
    return torch.where(j % 2 == 0, angle.sin(), angle.cos()).float()
