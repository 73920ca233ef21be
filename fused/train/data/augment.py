"""Random choices for the frames of a training clip: operations of a policy, the crop, mirroring, a part that is erased."""

import math
import random
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from fused.io.picture import MEAN, STD, Size, height_width, normalise, resize
from fused.train.data.auto_augment import AugmentPolicy, Operation, apply_operations

ASPECTS = (3 / 4, 4 / 3)  # lowest and highest aspect of a crop, width over height

ERASED = (0.02, 1 / 3)  # lowest and highest share of the frame that is erased
ERASED_ASPECTS = (0.3, 1 / 0.3)  # height over width
MEAN_BYTES = (round(255 * MEAN[0]), round(255 * MEAN[1]), round(255 * MEAN[2]))
ATTEMPTS = 10  # to find a box that is smaller than the frame


@dataclass(frozen=True)
class Crop:
    """A crop of the image, the same for all frames of a clip, as fractions that fit any image size."""

    area: float  # fraction of the image's area
    aspect: float  # width over height, relative to the size that the crop is resized to
    top: float  # of the free height: 0 at the upper edge, 1 at the lower
    left: float  # of the free width: 0 at the left edge, 1 at the right
    mirrored: bool

    @classmethod
    def sample(cls, rng: random.Random, scale: tuple[int | float, int | float], flip: int | float) -> "Crop":
        """Return a random crop.

        Its area is uniform in `scale`, the logarithm of its aspect uniform in `ASPECTS`, its position uniform. It is mirrored
        with probability `flip`.
        """
        area = rng.uniform(*scale)
        aspect = math.exp(rng.uniform(*map(math.log, ASPECTS)))
        return cls(area, aspect, rng.random(), rng.random(), rng.random() < flip)

    def apply(self, image: UInt8[Tensor, "H W 3"], size: Size) -> Float[Tensor, "3 height width"]:
        """Return the crop of a uint8 image (H, W, 3), resized to (3, height, width) and normalised, float32.

        The crop's aspect is relative to that of `size`. A crop higher or wider than the image takes its full height or width.
        """
        return normalise(self.cut(image, size))

    def cut(self, image: UInt8[Tensor, "H W 3"], size: Size) -> Float[Tensor, "3 height width"]:
        """Return what `apply` returns before it is normalised, with values from 0 to 1."""
        H, W = image.shape[:2]
        rows, columns = height_width(size)
        aspect = self.aspect * columns / rows
        height = min(H, max(1, round(math.sqrt(self.area * H * W / aspect))))
        width = min(W, max(1, round(math.sqrt(self.area * H * W * aspect))))
        top, left = int(self.top * (H - height + 1)), int(self.left * (W - width + 1))
        x = resize(image[top : top + height, left : left + width], rows, columns)
        return x.flip(-1) if self.mirrored else x


class Changes(NamedTuple):
    """The random changes of all frames of a clip: operations of a policy, and the crop."""

    crop: Crop
    operations: list[Operation]

    @classmethod
    def sample(
        cls, rng: random.Random, scale: tuple[int | float, int | float], flip: int | float, policy: AugmentPolicy | None
    ) -> "Changes":
        """Return random changes; `scale` and `flip` are those of `Crop.sample`."""
        crop = Crop.sample(rng, scale, flip)
        return cls(crop, policy.draw(rng) if policy is not None else [])

    def apply(
        self, image: UInt8[Tensor, "H W 3"], size: Size, dtype: torch.dtype, crop_first: bool
    ) -> Float[Tensor, "3 height width"] | UInt8[Tensor, "3 height width"]:
        """Return a frame after the changes: normalised float32, or with `dtype` torch.uint8 rounded bytes.

        Upstream crops images first, and fills with their mean colour what the operations leave free; clips it crops last, and
        fills with grey.
        """
        first, last = ([], self.operations) if crop_first else (self.operations, [])
        image = apply_operations(image, first)
        if dtype != torch.uint8 and not last:
            return self.crop.apply(image, size)
        cut = self.crop.cut(image, size).mul_(255).round_().to(torch.uint8)
        cut = apply_operations(cut.permute(1, 2, 0), last, fill=MEAN_BYTES).permute(2, 0, 1)
        return cut if dtype == torch.uint8 else normalise(cut.float() / 255)


def erase(clip: Tensor, rng: random.Random) -> Tensor:
    """Return a clip (3, T, H, W), or an image (3, H, W), with noise in a random box, the same box in all frames.

    The box's share of the frame is uniform in `ERASED`, the logarithm of its aspect uniform in `ERASED_ASPECTS`, its position
    uniform. The noise is normal, with mean 0 and standard deviation 1 after normalisation, and another in every frame. `clip`
    is normalised float32, or bytes, for which the noise is rounded and clamped. A box that does not fit is drawn again, up to
    10 times. Source: random erasing (arXiv 1708.04896), with the numbers of timm, by which upstream erases.
    """
    H, W = clip.shape[-2:]
    for _ in range(ATTEMPTS):
        area, aspect = rng.uniform(*ERASED) * H * W, math.exp(rng.uniform(*map(math.log, ERASED_ASPECTS)))
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < height < H and 0 < width < W:
            break
    else:
        return clip
    top, left = rng.randint(0, H - height), rng.randint(0, W - width)
    generator = torch.Generator().manual_seed(rng.getrandbits(63))
    noise = torch.randn(*clip.shape[:-2], height, width, generator=generator)
    if clip.dtype == torch.uint8:
        mean, std = (torch.tensor(values).view(3, *[1] * (clip.dim() - 1)) for values in (MEAN, STD))
        noise = (noise.mul(std).add(mean) * 255).round().clamp(0, 255)
    erased = clip.clone()
    erased[..., top : top + height, left : left + width] = noise.to(clip.dtype)
    return erased
