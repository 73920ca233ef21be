"""From pixels to tokens: patches of tubelets, positions, masks, and the fixed positions of the CLIP decoder."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from reference.models.videomamba.config import VideoMambaConfig
from reference.ops.dtypes import accumulation_dtype


class PatchEmbed(nn.Module):
    """Patch embedding: one strided convolution projects each tubelet of kernel_size x P x P pixels to the model width.

    `proj` is upstream's: a Conv3d with weight (D, C, t, P, P), or for images a Conv2d with weight (D, C, P, P).
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
        """Return patches (B, tubelets, patches of a frame in row order, D) of a clip (B, C, T, H, W) or image (B, C, H, W).

        Raise TypeError for a clip of another dtype than the weight's, unless autocast is on.
        """
        if clip.dtype != self.proj.weight.dtype and not torch.is_autocast_enabled(clip.device.type):
            weight_dtype = self.proj.weight.dtype
            raise TypeError(f"clip has dtype {clip.dtype}, parameters {weight_dtype}; allowed: the same, or torch.autocast")
        grid = self.proj(clip)
        if grid.dim() == 4:
            grid = grid.unsqueeze(2)
        return grid.flatten(3).permute(0, 2, 3, 1)


class Span(NamedTuple):
    """The part of a video that a clip holds: tubelets `start` to `start + tubelets - 1` of `total`. CLS goes with tubelet 0."""

    start: int
    tubelets: int
    total: int

    @property
    def has_cls(self) -> bool:
        """Whether CLS is one of this span's tokens."""
        return self.start == 0

    def tokens(self, patches: int) -> range:
        """Return the indices of this span's tokens among those of the whole video, where CLS is token 0."""
        return range(1 + self.start * patches - self.has_cls, 1 + (self.start + self.tubelets) * patches)


def span_of(
    clip: Tensor, config: VideoMambaConfig, use_image: bool = False, offset: int | None = None, total: int | None = None
) -> Span:
    """Return the span of the video that a clip (B, C, T, H, W) or image (B, C, H, W) holds.

    Without `offset` the clip is the whole video of `total` tubelets. With it the clip is a chunk, any number of whole tubelets
    that begins with tubelet `offset`. The default `total` is the length of the temporal table.

    Raise ValueError for a shape that the model was not built for and for a chunk that reaches past the video, TypeError for an
    integer dtype.
    """
    is_image = config.num_frames is None or use_image
    for name, value, least in (("temporal_pos_offset", offset, 0), ("temporal_pos_total", total, 1)):
        if value is None:
            continue
        if is_image:
            raise ValueError(f"{name} is {value!r}; an image has no place in time, allowed is None")
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name} is {value!r}; allowed are numbers of tubelets, integers from {least} up, or None")
    t, length = config.kernel_size, 1 if use_image else total or config.tubelets

    size: list[int | str] = [config.channels, *config.sides]
    if config.num_frames is not None:
        size.insert(1, "T" if offset is not None else length * t)
    pairs = list(zip(clip.shape[1:], size, strict=False))
    if clip.dim() != 1 + len(size) or any(allowed not in ("T", given) for given, allowed in pairs):
        layout = "(B, C, H, W)" if config.num_frames is None else "(B, C, T, H, W)"
        raise ValueError(f"clip has shape {tuple(clip.shape)}; this model takes {layout} = (B, {', '.join(map(str, size))})")
    if not clip.is_floating_point():
        raise TypeError(f"clip has dtype {clip.dtype}; allowed are floating-point dtypes, normalised as in training")
    if offset is None:
        return Span(0, length, length)

    frames = clip.shape[2]
    if frames == 0 or frames % t:
        raise ValueError(f"a chunk of {frames} frames; allowed are whole tubelets, multiples of kernel_size ({t}): keep the "
                         "frames that are left over for the next chunk")  # fmt: skip
    span = Span(offset, frames // t, length)
    if span.start + span.tubelets > length:
        raise ValueError(
            f"temporal_pos_offset is {offset}: tubelets {offset} to {offset + span.tubelets - 1} reach past the {length} of "
            "the video; a longer one needs its length as temporal_pos_total, the same for all chunks: the temporal table is "
            "stretched to it"
        )
    return span


def temporal_positions(table: Float[Tensor, "1 N D"], span: Span) -> Float[Tensor, "1 T D"]:
    """Return the temporal positions of the span, from the table (1, N, D) stretched linearly to the span's total length:

        row i of the stretched table = the table read at x = (i + 1/2) N / total - 1/2

    Reading is linear between the two rows around x, and constant beyond the first and the last row, as upstream resizes the
    table when it loads weights. With total = N the rows are returned as they are. Arithmetic is in at least float32 and
    rounded once.
    """
    N = table.shape[1]
    if span.total == N:
        return table[:, span.start : span.start + span.tubelets]
    precise = accumulation_dtype(table.dtype)
    with torch.autocast(table.device.type, enabled=False):
        i = torch.arange(span.start, span.start + span.tubelets, dtype=torch.float64, device=table.device)
        x = ((i + 0.5) * N / span.total - 0.5).clamp(0, N - 1)
        weights = (1 - (x[:, None] - torch.arange(N, device=table.device)).abs()).clamp(min=0)  # (T, N), of row n in position i
        return (weights.to(precise) @ table.to(precise)).to(table.dtype)


def check_mask(mask: Tensor, clips: int, length: int, has_cls: bool) -> None:
    """Raise ValueError unless the mask (B, L) bool, True = hidden, keeps CLS and the same number of tokens in every clip."""
    if mask.dtype != torch.bool or tuple(mask.shape) != (clips, length):
        raise ValueError(f"mask is {mask.dtype} {tuple(mask.shape)}; allowed is bool ({clips}, {length}), True = hidden")
    if has_cls and bool(mask[:, 0].any()):
        raise ValueError("mask hides CLS (column 0); it must stay visible")
    visible = (~mask).sum(1)
    if int(visible.min()) != int(visible.max()):
        fewest, most = int(visible.min()), int(visible.max())
        raise ValueError(f"mask leaves between {fewest} and {most} tokens; allowed: the same number in every clip")


def select_visible(tokens: Float[Tensor, "B L D"], mask: Bool[Tensor, "B L"] | None) -> Float[Tensor, "B V D"]:
    """Return the V tokens of each clip where the mask is False, or all tokens without a mask."""
    return tokens if mask is None else tokens[~mask].view(tokens.shape[0], -1, tokens.shape[2])


def sincos_positions(rows: int, dim: int) -> Float[Tensor, "rows dim"]:
    """Return the fixed positions (rows, dim) float32 of the CLIP decoder, row 0 being that of CLS:

        positions[row, j] = sin(angle) for even j, cos(angle) for odd j, with angle = row / 10000^(2 floor(j/2) / dim)
    """
    j = torch.arange(dim, dtype=torch.float64)
    angle = torch.arange(rows, dtype=torch.float64)[:, None] / 10000 ** (2 * (j // 2) / dim)
    return torch.where(j % 2 == 0, angle.sin(), angle.cos()).float()
