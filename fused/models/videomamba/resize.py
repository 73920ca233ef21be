"""Conversion of weights to other sizes: image patches to clips, positions to other grids and other numbers of frames."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from fused.runtime.dtypes import accumulation_dtype

INFLATIONS = ("centre", "mean")


def inflate_kernel(kernel: Float[Tensor, "D C P P"], tubelet: int, how: str = "centre") -> Float[Tensor, "D C t P P"]:
    """Return an image model's patch embedding for tubelets of `tubelet` frames; one frame keeps the values.

    "centre": frame tubelet // 2 has the image's weights, the others have zeros. "mean": every frame has the image's weights
    divided by `tubelet`, so that a still clip has the same tokens as its image. Raises ValueError for another `how`.
    """
    if how == "mean":
        return (kernel / tubelet).unsqueeze(2).repeat(1, 1, tubelet, 1, 1)
    if how != "centre":
        raise ValueError(f"inflate is {how!r}; allowed: {', '.join(map(repr, INFLATIONS))}")
    out = kernel.new_zeros(*kernel.shape[:2], tubelet, *kernel.shape[2:])
    out[:, :, tubelet // 2] = kernel
    return out


def resize_grid(
    positions: Float[Tensor, "1 before D"], before: tuple[int, int], after: tuple[int, int]
) -> Float[Tensor, "1 after D"]:
    """Return the positions for another grid (rows, columns) of patches: CLS stays, the patches are interpolated bicubically.

    Corners are not aligned; computed in at least float32. Raises ValueError if `before` is not the grid of `positions`.
    """
    cls, patches = positions[:, :1], positions[:, 1:]
    if before[0] * before[1] != patches.shape[1]:
        raise ValueError(f"grid is {before}; pos_embed {tuple(positions.shape)} has {patches.shape[1]} patches and CLS")
    image = patches.to(accumulation_dtype(patches.dtype)).unflatten(1, before).permute(0, 3, 1, 2)
    image = F.interpolate(image, size=after, mode="bicubic", align_corners=False)
    return torch.cat((cls, image.flatten(2).transpose(1, 2).to(cls.dtype)), dim=1)


def resize_frames(positions: Float[Tensor, "1 before D"], after: int) -> Float[Tensor, "1 after D"]:
    """Return the positions for another number of frames, interpolated linearly in at least float32; corners are not aligned."""
    precise = positions.to(accumulation_dtype(positions.dtype))
    line = F.interpolate(precise.transpose(1, 2), size=after, mode="linear", align_corners=False)
    return line.transpose(1, 2).to(positions.dtype)
