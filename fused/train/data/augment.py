"""Random choices for the frames of a training clip: the crop of the image, mirroring."""

import math
import random
from dataclasses import dataclass

from jaxtyping import Float, UInt8
from torch import Tensor

from fused.io.picture import Size, height_width, normalise, resize

ASPECTS = (3 / 4, 4 / 3)  # lowest and highest aspect of a crop, width over height


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
