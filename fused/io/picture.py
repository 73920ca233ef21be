"""A frame as a model takes it: resized, cropped, normalised."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

MEAN = (0.485, 0.456, 0.406)  # of ImageNet's red, green and blue, in 0..1
STD = (0.229, 0.224, 0.225)

Colour = tuple[int | float, int | float, int | float]
"""A number for each of red, green and blue."""

Size = int | tuple[int, int]
"""The side of a square, or (height, width), in pixels."""


def height_width(size: Size) -> tuple[int, int]:
    """Return (height, width) of a size. Raise ValueError for what is neither a number nor a pair."""
    if isinstance(size, int):
        return size, size
    if not isinstance(size, tuple | list) or len(size) != 2:
        raise ValueError(f"size must be pixels of a side, or (height, width), got {size!r}")
    return size[0], size[1]


def centre_crop(
    image: UInt8[Tensor, "H W 3"], size: Size, mean: Colour = MEAN, std: Colour = STD
) -> Float[Tensor, "3 height width"]:
    """Return the middle of an image, resized so that it just covers `size`, and normalised."""
    height, width = height_width(size)
    x = resize_to_cover(image, size)
    top, left = (x.shape[1] - height) // 2, (x.shape[2] - width) // 2
    return normalise(x[:, top : top + height, left : left + width], mean, std)


def stretch(
    image: UInt8[Tensor, "H W 3"], size: Size, mean: Colour = MEAN, std: Colour = STD
) -> Float[Tensor, "3 height width"]:
    """Return the whole image, resized bicubically to `size` whatever its aspect is, and normalised, as video_mm tests."""
    return normalise(resize_bicubic(image, *height_width(size)).float() / 255, mean, std)


def resize_to_cover(image: UInt8[Tensor, "H W 3"], size: Size) -> Float[Tensor, "3 height width"]:
    """Return the image, with values from 0 to 1, resized by `resize` so that it just covers `size`."""
    height, width = height_width(size)
    scale = max(height / image.shape[0], width / image.shape[1])
    return resize(image, max(height, round(image.shape[0] * scale)), max(width, round(image.shape[1] * scale)))


def resize(image: UInt8[Tensor, "H W 3"], height: int, width: int) -> Float[Tensor, "3 height width"]:
    """Return the image with values from 0 to 1, resized bilinearly with antialiasing, in float32."""
    x = image.permute(2, 0, 1)[None].float() / 255
    return F.interpolate(x, size=(height, width), mode="bilinear", antialias=True, align_corners=False)[0]


def resize_bytes(image: UInt8[Tensor, "H W 3"], height: int, width: int) -> UInt8[Tensor, "3 height width"]:
    """Return the image resized bilinearly without antialiasing, in bytes: bit for bit as OpenCV's cv2.resize (INTER_LINEAR).

    Upstream resizes frames so. OpenCV rounds weights to 1/2048, adds columns exactly, and rounds twice when it adds rows.
    """
    columns, column_weights = _taps(image.shape[1], width, True)
    rows, row_weights = _taps(image.shape[0], height, False)
    total = torch.zeros(height, width, 3, dtype=torch.int32)
    for row, weight in zip(rows, row_weights, strict=True):
        line = image.index_select(0, row)  # (height, W, 3)
        left, right = (
            line.index_select(1, column).to(torch.int32) * w[:, None]
            for column, w in zip(columns, column_weights, strict=True)
        )
        total += (((left + right) >> 4) * weight[:, None, None]) >> 16
    return ((total + 2) >> 2).clamp_(0, 255).to(torch.uint8).permute(2, 0, 1)


def resize_bicubic(image: UInt8[Tensor, "H W 3"], height: int, width: int) -> UInt8[Tensor, "3 height width"]:
    """Return the image resized bicubically with antialiasing, in bytes: as Pillow does, but for 1 in 0.5 % of the values."""
    x = image.permute(2, 0, 1)[None]
    return F.interpolate(x, size=(height, width), mode="bicubic", antialias=True, align_corners=False)[0]


def _taps(before: int, after: int, whole_at_border: bool) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return the two pixels, int64 (after,) each, that make a resized one, and their weights in 1/2048, int32 (after,).

    Beyond the centre of a border pixel both are that pixel; with `whole_at_border` the first has the whole weight there, which
    is rounded once, as OpenCV does for columns and not for rows.
    """
    place = ((torch.arange(after, dtype=torch.float64) + 0.5) * (before / after) - 0.5).to(torch.float32)
    first = place.floor()
    share = place - first
    if whole_at_border:
        share[(first < 0) | (first >= before - 1)] = 0.0
    lower, upper = first.long().clamp(0, before - 1), (first.long() + 1).clamp(0, before - 1)
    weight_lower, weight_upper = (((w * 2048).round().to(torch.int32)) for w in (1 - share, share))
    return (lower, upper), (weight_lower, weight_upper)


def normalise(image: Float[Tensor, "*N 3 H W"], mean: Colour = MEAN, std: Colour = STD) -> Float[Tensor, "*N 3 H W"]:
    """Return images of values from 0 to 1, minus the mean, divided by the standard deviation, by default ImageNet's."""
    offset, scale = (torch.tensor(values, dtype=torch.float32)[:, None, None] for values in (mean, std))
    return (image - offset) / scale
