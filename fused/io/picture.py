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
    scale = max(height / image.shape[0], width / image.shape[1])
    x = resize(image, max(height, round(image.shape[0] * scale)), max(width, round(image.shape[1] * scale)))
    top, left = (x.shape[1] - height) // 2, (x.shape[2] - width) // 2
    return normalise(x[:, top : top + height, left : left + width], mean, std)


def resize(image: UInt8[Tensor, "H W 3"], height: int, width: int) -> Float[Tensor, "3 height width"]:
    """Return the image with values from 0 to 1, resized bilinearly with antialiasing, in float32."""
    x = image.permute(2, 0, 1)[None].float() / 255
    return F.interpolate(x, size=(height, width), mode="bilinear", antialias=True, align_corners=False)[0]


def normalise(image: Float[Tensor, "3 H W"], mean: Colour = MEAN, std: Colour = STD) -> Float[Tensor, "3 H W"]:
    """Return an image of values from 0 to 1, minus the mean, divided by the standard deviation, by default ImageNet's."""
    offset, scale = (torch.tensor(values, dtype=torch.float32)[:, None, None] for values in (mean, std))
    return (image - offset) / scale
