"""Random choices for a training clip: the frames of the video, the crop of the image, mirroring."""

import math
import random
from dataclasses import dataclass

from jaxtyping import Float, UInt8
from torch import Tensor

from fused.io.video import normalise, resize

ASPECTS = (3 / 4, 4 / 3)  # lowest and highest aspect of a crop, width over height


def segment_frames(total: int, frames: int, rng: random.Random) -> list[int]:
    """Return indices of one frame of each of `frames` equal segments of a video, or none if it has too few.

    Each of a segment's frames is equally likely. `total` is the number of frames of the video. Evaluation takes the middle
    frame of a segment: `fused.io.video.middle_frames`.
    """
    if total < frames:
        return []
    edges = [i * total // frames for i in range(frames + 1)]
    return [rng.randrange(first, end) for first, end in zip(edges, edges[1:], strict=False)]


def dense_frames(total: int, frames: int, stride: int, rng: random.Random | None) -> list[int]:
    """Return `frames` frame indices, `stride` apart, or none if the video has fewer than that takes.

    Every possible start is equally likely; without `rng` it is the middle one. `total` is the number of frames of the video.
    """
    starts = total - (frames - 1) * stride
    if starts < 1:
        return []
    first = rng.randrange(starts) if rng else (starts - 1) // 2
    return [first + i * stride for i in range(frames)]


@dataclass(frozen=True)
class Crop:
    """A crop of the image, the same for all frames of a clip, as fractions that fit any image size."""

    area: float  # fraction of the image's area
    aspect: float  # width over height
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

    def apply(self, image: UInt8[Tensor, "H W 3"], size: int) -> Float[Tensor, "3 size size"]:
        """Return the crop of a uint8 image (H, W, 3), resized to (3, size, size) and normalised, float32.

        A crop higher or wider than the image takes its full height or width.
        """
        H, W = image.shape[:2]
        height = min(H, max(1, round(math.sqrt(self.area * H * W / self.aspect))))
        width = min(W, max(1, round(math.sqrt(self.area * H * W * self.aspect))))
        top, left = int(self.top * (H - height + 1)), int(self.left * (W - width + 1))
        x = normalise(resize(image[top : top + height, left : left + width], size, size))
        return x.flip(-1) if self.mirrored else x
