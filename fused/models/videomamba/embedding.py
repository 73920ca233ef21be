"""The embedding: patches by one matrix product, the tokens that a mask leaves visible, and the positions of tokens."""

from functools import lru_cache

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from fused.models.videomamba.config import VideoMambaConfig
from fused.modules.span import Span, check_tubelets
from fused.modules.wrapped import computes_plainly, hooks_of, weight_of
from fused.runtime.autocast import autocast_dtype
from fused.runtime.dtypes import accumulation_dtype
from fused.runtime.exporting import is_exporting


class PatchEmbed(nn.Module):
    """A linear projection of the tubelets of a clip, kernel_size x P x P pixels each, to the model's width.

    `proj` is upstream's convolution and only holds its parameters. The product is a matmul over the pixels laid out in
    rows: it is repeatable bit for bit on a GPU, where cuDNN may choose another algorithm, and it can leave out hidden patches.
    A `proj` with an adapter or hooks is called as a module.
    """

    def __init__(self, config: VideoMambaConfig) -> None:
        super().__init__()
        self.patch, self.step, self.tubelet = config.patch_size, config.stride or config.patch_size, config.kernel_size
        sides, steps = (self.patch,) * 2, (self.step,) * 2
        self.is_image = config.num_frames is None
        self.proj: nn.Conv2d | nn.Conv3d
        if self.is_image:
            self.tubelet = 1
            self.proj = nn.Conv2d(config.channels, config.embed_dim, sides, steps)
        else:
            self.proj = nn.Conv3d(config.channels, config.embed_dim, (self.tubelet, *sides), (self.tubelet, *steps))

    def forward(self, clip: Float[Tensor, "B C *T H W"], visible: Int[Tensor, "B V"] | None = None) -> Float[Tensor, "B S D"]:
        """Return the projected patches of a clip (B, C, T, H, W) or image (B, C, H, W), frame after frame, row after row.

        `visible` holds indices of patches, counted over the clip; only these are projected then. Raises TypeError for a clip
        in another dtype than the parameters' without autocast, ValueError for one on another device.
        """
        weight = weight_of(self.proj)
        if clip.device != weight.device:
            raise ValueError(f"clip is on {clip.device}, parameters on {weight.device}; allowed: the same device")
        if clip.dtype != weight.dtype and autocast_dtype(clip.device) is None:
            raise TypeError(f"clip has dtype {clip.dtype}, parameters {weight.dtype}; allowed: the same, or torch.autocast")
        if hooks_of(self.proj) or not computes_plainly(self.proj):
            patches = self.proj(clip if self.is_image or clip.dim() == 5 else clip.unsqueeze(2)).flatten(2).transpose(1, 2)
            return patches if visible is None else patches[torch.arange(len(clip), device=clip.device)[:, None], visible]
        pixels = self._view_patches(clip if clip.dim() == 5 else clip.unsqueeze(2))
        if visible is None:
            rows = pixels.flatten(4).flatten(1, 3)
        else:
            grid_rows, grid_columns = pixels.shape[2:4]
            frame, row = visible // (grid_rows * grid_columns), visible // grid_columns % grid_rows
            column = visible % grid_columns
            clips = torch.arange(clip.shape[0], device=clip.device)[:, None]
            rows = pixels[clips, frame, row, column].flatten(2)
        return F.linear(rows, weight.flatten(1), self.proj.bias)

    def _view_patches(self, clip: Tensor) -> Tensor:
        """Return a view (B, tubelets, rows, columns, C, t, P, P) of a clip (B, C, T, H, W)."""
        P, t, step = self.patch, self.tubelet, self.step
        if step != P:
            return clip.unfold(2, t, t).unfold(3, P, step).unfold(4, P, step).permute(0, 2, 3, 4, 1, 5, 6, 7)
        rows, columns = clip.shape[3] // P, clip.shape[4] // P
        covered = clip[..., : rows * P, : columns * P]
        return covered.unflatten(4, (columns, P)).unflatten(3, (rows, P)).unflatten(2, (-1, t)).permute(0, 2, 4, 6, 1, 3, 5, 7)


def span_of(
    clip: Tensor, config: VideoMambaConfig, use_image: bool = False, offset: int | None = None, total: int | None = None
) -> Span:
    """Return the span of a video that a clip holds: all of it if `offset` is None, else the tubelets from number `offset` on.

    `total` is the number of tubelets to which the temporal table is stretched, None for the model's own.

    Raises ValueError for a shape, offset or total that does not fit the model, TypeError for a dtype that is not real
    floating point.
    """
    image = config.num_frames is None
    check_tubelets("temporal_pos_offset", offset, 0, image or use_image)
    check_tubelets("temporal_pos_total", total, 1, image or use_image)
    length = 1 if use_image else total or config.tubelets
    if not isinstance(clip, Tensor):
        raise TypeError(f"clip is a {type(clip).__name__}; allowed: a tensor")
    layout, wanted = "(B, C, H, W)", [config.channels, *config.sides]
    if not image:
        layout = "(B, C, T, H, W)"
        wanted.insert(1, -1 if offset is not None else length * config.kernel_size)
    if clip.dim() != 1 + len(wanted) or any(w not in (-1, n) for n, w in zip(clip.shape[1:], wanted, strict=True)):
        numbers = ", ".join("T" if n == -1 else str(n) for n in wanted)
        message = f"clip has shape {tuple(clip.shape)}; this model takes {layout} = (B, {numbers})"
        raise ValueError(message + ("" if image or use_image else _length_hint(clip, config, total)))
    if not clip.is_floating_point():
        raise TypeError(f"clip has dtype {clip.dtype}; allowed are floating-point dtypes, normalised as in training")
    if offset is None:
        return Span(0, length, length)

    count, rest = divmod(clip.shape[2], config.kernel_size)
    if rest or not count:
        raise ValueError(
            f"clip has {clip.shape[2]} frames; a chunk is made of whole tubelets, so allowed are multiples of kernel_size "
            f"({config.kernel_size}) from {config.kernel_size} up: keep what is left over for the next chunk"
        )
    if offset + count > length:
        raise ValueError(
            f"temporal_pos_offset is {offset} and the chunk has {count} tubelets, which ends past the video's {length}; of a "
            "longer video pass all its tubelets as temporal_pos_total with every chunk: the temporal table is stretched to it"
        )
    return Span(offset, count, length)


def _length_hint(clip: Tensor, config: VideoMambaConfig, total: int | None) -> str:
    """Return what to do about a clip (B, C, T, H, W) whose number of frames alone does not fit the model, "" for another."""
    if clip.dim() != 5 or (clip.shape[1], *clip.shape[3:]) != (config.channels, *config.sides):
        return ""
    frames, t = clip.shape[2], config.kernel_size
    if total is not None:
        return f" for temporal_pos_total={total}; of a chunk pass temporal_pos_offset too"
    if not frames or frames % t:
        return f". Of another length a clip needs a multiple of kernel_size ({t}) frames, and temporal_pos_total"
    return f". For {frames} frames pass temporal_pos_total={frames // t}: the table of temporal positions is stretched to it"


def temporal_positions(table: Float[Tensor, "1 N D"], span: Span) -> Float[Tensor, "T D"]:
    """Return the temporal positions of a clip: rows of the table, stretched to `span.total` tubelets if N is another.

    Stretching is upstream's for checkpoints of another length: position i lies at (2i + 1) N / (2 total) - 1/2 between
    two rows and is interpolated linearly, in at least float32. Rows are indexed, because the gradient of indexing is
    repeatable bit for bit on a GPU and that of `interpolate` is not.
    """
    rows, N, total = table[0], table.shape[1], span.total
    if total == N:
        return rows[span.start : span.start + span.tubelets]
    indices = range(span.start, span.start + span.tubelets)
    scaled = [min(max((2 * i + 1) * N - total, 0), 2 * total * (N - 1)) for i in indices]  # exact: 2 * total * row
    low = torch.tensor([x // (2 * total) for x in scaled], device=table.device)
    precise = accumulation_dtype(table.dtype)
    fraction = torch.tensor([x % (2 * total) / (2 * total) for x in scaled], dtype=precise, device=table.device)[:, None]
    high = (low + 1).clamp(max=N - 1)
    return (rows[low].to(precise) * (1 - fraction) + rows[high].to(precise) * fraction).to(table.dtype)


def check_visible(visible: Tensor, mask: Tensor | None, clips: int, length: int) -> None:
    """Raise ValueError unless the indices of visible tokens are int64 (clips, V), V up to length, and there is no mask."""
    if mask is not None:
        raise ValueError("mask and visible are given; allowed: one of them")
    if visible.dtype != torch.int64 or visible.dim() != 2 or len(visible) != clips or not 0 < visible.shape[1] <= length:
        found = f"{visible.dtype} {tuple(visible.shape)}"
        raise ValueError(f"visible is {found}; allowed is int64 ({clips}, V) with V from 1 to {length}, indices of tokens")


def visible_tokens(
    mask: Bool[Tensor, "B L"], clips: int, length: int, device: torch.device, cls: int = 1
) -> Int[Tensor, "B V"]:
    """Return ascending indices of the tokens that a mask (True = hidden) leaves visible, on `device`.

    `cls` is 1 if column 0 is CLS, else 0. Raises ValueError unless the mask is bool (clips, length), has values, leaves CLS
    visible, and leaves the same number of tokens in every clip.
    """
    if mask.dtype != torch.bool or tuple(mask.shape) != (clips, length):
        raise ValueError(f"mask is {mask.dtype} {tuple(mask.shape)}; allowed is bool ({clips}, {length}), True = hidden")
    if mask.is_meta:
        raise ValueError("mask is on the meta device; the number of visible tokens depends on its values: pass it on the CPU")
    count = (~mask).sum(1)
    # one transfer: on a GPU each read of the mask's contents waits for the stream
    hidden_cls, fewest, most = torch.stack((mask[:, :cls].any().to(count.dtype), count.min(), count.max())).tolist()
    if hidden_cls:
        raise ValueError("mask hides CLS (column 0); it must stay visible")
    if fewest != most:
        raise ValueError(f"mask leaves between {fewest} and {most} tokens; allowed: the same number in every clip")
    return mask.to(torch.uint8).argsort(dim=1, stable=True)[:, :most].to(device)


def sincos_positions(rows: int, dim: int, device: torch.device, first: int = 0) -> Float[Tensor, "rows dim"]:
    """Return the fixed positions of the CLIP decoder, float32, for tokens `first` to `first + rows - 1`; token 0 is CLS.

        position[token, j] = sin(a) for even j, cos(a) for odd j, a = token / 10000^(2 floor(j/2) / dim)

    Callers share the tensor: do not write to it.
    """
    # a tensor that is created during an export belongs to the exported program and must not be cached
    return (_make_sincos if is_exporting() else _cached_sincos)(rows, dim, device, first)


@lru_cache(maxsize=16)  # float64 sines on the CPU: 0.2 s for 64 frames of VideoMamba-M
@torch.inference_mode(False)  # a tensor made in inference mode could not be used in training later
def _cached_sincos(rows: int, dim: int, device: torch.device, first: int) -> Tensor:
    """Return `_make_sincos` from a cache."""
    return _make_sincos(rows, dim, device, first)


def _make_sincos(rows: int, dim: int, device: torch.device, first: int) -> Tensor:
    """Return the positions (rows, dim), computed in float64 on the CPU."""
    column = torch.arange(dim, dtype=torch.float64, device="cpu")
    wavelength = 10000 ** (column.div(2, rounding_mode="floor") * 2 / dim)
    angle = torch.arange(first, first + rows, dtype=torch.float64, device="cpu")[:, None] / wavelength
    angle[:, 0::2].sin_()
    angle[:, 1::2].cos_()
    return angle.float().to(device)
