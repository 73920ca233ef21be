"""How a video becomes the clip that a model takes. A model's folder keeps it, and training and evaluation read by it."""

import random
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from jaxtyping import Float, UInt8
from torch import Tensor

from fused.io.picture import MEAN, STD, Colour, Size, centre_crop, stretch
from fused.io.sampling import Times, border_frames, dense_frames, frames_at_rate, segment_frames, view_frames
from fused.io.video import VideoError, VideoTooShort, decode_clip
from fused.rules import COUNT, POSITIVE, Rule, is_integer, is_number, one_of

TICK = 1e-6  # seconds; times are rounded in the file's units


def _is_size(value: Any) -> bool:
    """Return whether `value` is a positive integer or a pair of them."""
    sides = value if isinstance(value, tuple) and len(value) == 2 else (value,)
    return all(is_integer(side, 1) for side in sides)


def _colours(holds: Any, allowed: str) -> Rule:
    """Return the rule for three numbers, for each of which `holds` is true."""
    return Rule(lambda v: isinstance(v, tuple) and len(v) == 3 and all(is_number(x, holds) for x in v), allowed)


SHORT = ("drop", "loop", "last")
"""What becomes of a video that is too short."""

RULES = {
    "frames": COUNT.optional(),
    "size": Rule(_is_size, "pixels of a side, or [height, width]"),
    "sampling": one_of(("segments", "dense", "borders")),
    "stride": COUNT,
    "fps": POSITIVE.optional(),
    "short": one_of(SHORT),
    "crop": one_of(("centre", "stretch")),
    "first_seconds": POSITIVE.optional(),
    "mean": _colours(lambda x: abs(x) < float("inf"), "three numbers, of red, green and blue"),
    "std": _colours(lambda x: 0 < x < float("inf"), "three positive numbers, of red, green and blue"),
}
"""The rule of each field of `Preprocessing`."""


@dataclass(frozen=True)
class Preprocessing:
    """How frames are chosen from a video, and how they become the clip that a model was trained on.

    "segments" cuts the video into `frames` equal segments and takes a frame of each; "dense" takes frames that are `stride`
    apart; "borders" is the rule of upstream's video-text models (`sampling.border_frames`). With `fps` the video is first shown
    at this rate: frame k is the one that is seen k / fps seconds after the first.

    Raises ValueError at construction; the message names the field, its value and the allowed values.
    """

    frames: int | None  # of a clip; None: an image
    size: Size  # of a frame in pixels: one side, or (height, width)
    sampling: str = "segments"  # or "dense" or "borders"
    stride: int = 4  # frames from one to the next, of "dense"
    fps: int | float | None = None  # frames a second at which the video is shown before it is sampled; None: all its frames
    short: str = "drop"  # a video that is too short is left out; "loop" plays it again, "last" repeats its last frame
    crop: str = "centre"  # the middle of the frame, resized until it just covers `size`; "stretch": all of it, aspect not kept
    mean: Colour = MEAN  # of red, green and blue in 0..1, subtracted
    std: Colour = STD  # by which the difference is divided
    first_seconds: int | float | None = None  # the part of a longer video that is read; None: all of it

    def __post_init__(self) -> None:
        for f in fields(self):
            RULES[f.name].check(f"preprocessing.{f.name}", getattr(self, f.name))

    def read(
        self, path: str | Path, *, frame_pattern: str | None = None, stated_frames: int | None = None
    ) -> Float[Tensor, "3 *T height width"]:
        """Return the clip of a video file or of a folder of images, as evaluation reads it: float32 (3, T, height, width).

        Of each segment it is the middle frame; "dense" frames are those around the middle of the video. Without `frames`, for
        an image model, it is the middle frame of the video, or the image of a file: (3, height, width). `frame_pattern`, such
        as "img_*.jpg", selects the images of a folder, of which the first `stated_frames` are taken (None: all).

        Raises VideoError for what cannot be read, and for `fps` with a folder of images, which states no times. Raises
        VideoTooShort, a VideoError, for a video that is too short, if `short` is "drop"; ImportError without PyAV.
        """
        path = Path(path)
        clip = decode_clip(
            path, lambda total, times: self.frame_numbers(path, total, times), self.prepare,
            pattern=frame_pattern, stated=stated_frames,
        )  # fmt: skip
        return clip if self.frames else clip[:, 0]

    def prepare(self, image: UInt8[Tensor, "H W 3"]) -> Float[Tensor, "3 height width"]:
        """Return an image as `crop` says, of `size`, minus the mean, over the standard deviation."""
        return (stretch if self.crop == "stretch" else centre_crop)(image, self.size, self.mean, self.std)

    def frame_numbers(
        self, path: Path, total: int, times: Times, rng: random.Random | None = None, view: int = 0, views: int = 1
    ) -> list[int]:
        """Return the numbers of a clip's frames in the order of the clip; a short video's occur several times.

        `total` is the number of frames of the video and `times` their seconds. With `rng` every choice is random. Without it,
        the clip is number `view` of `views` that are spread evenly, a single one in the middle.

        Raises VideoTooShort, with "drop", and VideoError for `fps` where the video states no times.
        """
        frames = self.frames or 1
        if self.first_seconds is not None:
            if times is None:
                raise VideoError(path, "a folder of images states no times", "allowed is first_seconds=None, or a video file")
            last = times[-1] - times[-2] if total > 1 else 0.0
            if times[-1] + last > self.first_seconds + TICK:  # those frames whose time is over by then
                total = max(1, bisect_right(times, self.first_seconds + TICK) - 1)
                times = times[:total]
        if self.fps is None:
            shown: Sequence[int] = range(total)
        elif times is None:
            raise VideoError(path, "a folder of images states no times", "allowed is fps=None, or a video file")
        else:
            shown = frames_at_rate(times, self.fps)
        n, least = len(shown), (frames - 1) * self.stride + 1 if self.sampling == "dense" else frames
        if n < least and self.short == "drop":
            apart = f", {frames} that are {self.stride} apart" if self.sampling == "dense" else ""
            rate = "" if self.fps is None else f" at {self.fps} a second"
            allowed = f"allowed are videos of at least {least} frames{apart}{rate}; short=loop and short=last repeat frames"
            raise VideoTooShort(path, f"too short: it has {n} frame{'' if n == 1 else 's'}{rate}", allowed)
        length = max(n, least)
        if self.sampling == "dense":
            places = dense_frames(length, frames, self.stride, rng, view, views)
        elif self.sampling == "borders":
            places = border_frames(length if self.short == "loop" else n, frames, rng, view, views)
        else:
            places = segment_frames(length, frames, rng) if rng else view_frames(length, frames, view, views)
        return [shown[place % n if self.short == "loop" else min(place, n - 1)] for place in places]
