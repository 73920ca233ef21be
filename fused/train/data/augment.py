"""What chance decides about a clip in training: which of the video's frames, which part of them, which way round."""

import math
import random
from dataclasses import dataclass

from jaxtyping import Float, UInt8
from torch import Tensor

from fused.io.video import normalised, resized

ASPECTS = (3 / 4, 4 / 3)  # width over height of the part that is cut out


def segment_frames(total: int, frames: int, chance: random.Random) -> list[int]:
    """One frame of each of `frames` equal segments of a video's `total` frames, each as likely as another; none if the video
    has too few. In evaluation it is the middle one: `fused.io.video.sample`."""
    if total < frames:
        return []
    edges = [i * total // frames for i in range(frames + 1)]
    return [chance.randrange(first, end) for first, end in zip(edges, edges[1:], strict=False)]


def dense_frames(total: int, frames: int, stride: int, chance: random.Random | None) -> list[int]:
    """`frames` frames, `stride` apart, from a start that each is as likely as another; the middle start without `chance`;
    none if the video has too few."""
    starts = total - (frames - 1) * stride
    if starts < 1:
        return []
    first = chance.randrange(starts) if chance else (starts - 1) // 2
    return [first + i * stride for i in range(frames)]


@dataclass(frozen=True)
class Crop:
    """A part of the picture, the same for all frames of a clip."""

    area: float  # of the picture's
    aspect: float  # width over height
    down: float  # 0 at the upper edge, 1 at the lower
    across: float
    mirrored: bool

    @classmethod
    def draw(cls, chance: random.Random, scale: tuple[int | float, int | float], flip: int | float) -> "Crop":
        """Area uniform in `scale`, the logarithm of the aspect uniform in `ASPECTS`, the place uniform, mirrored with
        probability `flip`."""
        area = chance.uniform(*scale)
        aspect = math.exp(chance.uniform(*map(math.log, ASPECTS)))
        return cls(area, aspect, chance.random(), chance.random(), chance.random() < flip)

    def cut(self, image: UInt8[Tensor, "H W 3"], size: int) -> Float[Tensor, "3 size size"]:
        """The part of an image, resized to `size` and normalised. Where it is higher or wider than the image it is the
        image's whole height or width."""
        H, W = image.shape[:2]
        height = min(H, max(1, round(math.sqrt(self.area * H * W / self.aspect))))
        width = min(W, max(1, round(math.sqrt(self.area * H * W * self.aspect))))
        top, left = int(self.down * (H - height + 1)), int(self.across * (W - width + 1))
        x = normalised(resized(image[top : top + height, left : left + width], size, size))
        return x.flip(-1) if self.mirrored else x
