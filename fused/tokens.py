"""From pixels to tokens: patches by one matrix product, which of them a mask leaves, and the CLIP decoder's positions."""

from functools import lru_cache

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from .config import VideoMambaConfig


class PatchEmbed(nn.Module):
    """Cut a clip into tubelets of kernel_size x P x P pixels and project each to the model width.

    `proj` is upstream's convolution and only holds its parameters: the product is a matmul over the pixels laid out in
    rows, which is repeatable bit for bit on a GPU (cuDNN's choice of algorithm is not ours) and can leave out what a
    mask hides.
    """

    def __init__(self, config: VideoMambaConfig) -> None:
        super().__init__()
        self.patch, self.step, self.tubelet = config.patch_size, config.stride or config.patch_size, config.kernel_size
        sides, steps = (self.patch,) * 2, (self.step,) * 2
        self.proj: nn.Conv2d | nn.Conv3d
        if config.num_frames is None:
            self.tubelet = 1
            self.proj = nn.Conv2d(config.channels, config.embed_dim, sides, steps)
        else:
            self.proj = nn.Conv3d(config.channels, config.embed_dim, (self.tubelet, *sides), (self.tubelet, *steps))

    def forward(self, clip: Float[Tensor, "B C *T H W"], kept: Int[Tensor, "B V"] | None = None) -> Float[Tensor, "B S D"]:
        """Patches of a clip (B, C, T, H, W) or image (B, C, H, W), frame after frame, row after row.

        `kept` holds the indices of the visible tokens, CLS (0) first; only their patches are then projected.
        """
        pixels = self._cut(clip if clip.dim() == 5 else clip.unsqueeze(2))
        if kept is None:
            rows = pixels.reshape(clip.shape[0], -1, pixels[0, 0, 0, 0].numel())
        else:
            _, _, down, across = pixels.shape[:4]
            patch = kept[:, 1:] - 1
            frame, row, column = patch // (down * across), patch // across % down, patch % across
            clips = torch.arange(clip.shape[0], device=clip.device)[:, None]
            rows = pixels[clips, frame, row, column].flatten(2)
        return F.linear(rows, self.proj.weight.flatten(1), self.proj.bias)

    def _cut(self, clip: Tensor) -> Tensor:
        """(B, C, T, H, W) to a view (B, tubelets, rows, columns, C, t, P, P)."""
        P, t, step = self.patch, self.tubelet, self.step
        if step != P:
            return clip.unfold(2, t, t).unfold(3, P, step).unfold(4, P, step).permute(0, 2, 3, 4, 1, 5, 6, 7)
        down, across = clip.shape[3] // P, clip.shape[4] // P
        whole = clip[..., : down * P, : across * P]
        return whole.unflatten(4, (across, P)).unflatten(3, (down, P)).unflatten(2, (-1, t)).permute(0, 2, 4, 6, 1, 3, 5, 7)


def check_clip(clip: Tensor, config: VideoMambaConfig, use_image: bool = False) -> None:
    """Raise ValueError (shape) or TypeError (dtype) unless the clip is what the model was built for."""
    layout, wanted = "(B, C, H, W)", [config.channels, *config.sides]
    if config.num_frames is not None:
        layout = "(B, C, T, H, W)"
        wanted.insert(1, config.kernel_size if use_image else config.num_frames)
    if list(clip.shape[1:]) != wanted:
        numbers = ", ".join(map(str, wanted))
        raise ValueError(f"clip has shape {tuple(clip.shape)}; this model takes {layout} = (B, {numbers})")
    if not clip.is_floating_point():
        raise TypeError(f"clip has dtype {clip.dtype}; allowed are floating-point dtypes, normalised as in training")


def visible_tokens(mask: Bool[Tensor, "B L"], clips: int, length: int, device: torch.device) -> Int[Tensor, "B V"]:
    """Ascending indices of the tokens that a mask (True = hidden) leaves visible, on `device`.

    Raises ValueError unless the mask is bool (B, L), keeps CLS, and keeps as many tokens in every clip.
    """
    if mask.dtype != torch.bool or tuple(mask.shape) != (clips, length):
        raise ValueError(f"mask is {mask.dtype} {tuple(mask.shape)}; allowed is bool ({clips}, {length}), True = hidden")
    count = (~mask).sum(1)
    # one transfer: on a GPU every question asked of the mask's contents waits for the queue to drain
    hidden_cls, fewest, most = torch.stack((mask[:, 0].any().to(count.dtype), count.min(), count.max())).tolist()
    if hidden_cls:
        raise ValueError("mask hides CLS (column 0); it must stay visible")
    if fewest != most:
        raise ValueError(f"mask leaves between {fewest} and {most} tokens; every clip needs as many")
    return mask.to(torch.uint8).argsort(dim=1, stable=True)[:, :most].to(device)


def sincos_positions(rows: int, dim: int, device: torch.device) -> Float[Tensor, "rows dim"]:
    """Fixed positions of the CLIP decoder in float32; row 0 is CLS.

        position[row, j] = sin(a) for even j, cos(a) for odd j, a = row / 10000^(2 floor(j/2) / dim)

    Callers share the tensor: do not write to it.
    """
    # a tensor made while exporting is none afterwards
    return (_make_sincos if torch.compiler.is_exporting() else _kept_sincos)(rows, dim, device)


@lru_cache(maxsize=16)  # float64 sines on the CPU: 0.2 s for 64 frames of VideoMamba-M
@torch.inference_mode(False)  # a tensor made in inference mode could not be used in training later
def _kept_sincos(rows: int, dim: int, device: torch.device) -> Tensor:
    return _make_sincos(rows, dim, device)


def _make_sincos(rows: int, dim: int, device: torch.device) -> Tensor:
    column = torch.arange(dim, dtype=torch.float64, device="cpu")
    wavelength = 10000 ** (column.div(2, rounding_mode="floor") * 2 / dim)
    angle = torch.arange(rows, dtype=torch.float64, device="cpu")[:, None] / wavelength
    angle[:, 0::2].sin_()
    angle[:, 1::2].cos_()
    return angle.float().to(device)
