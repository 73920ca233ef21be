"""The description of how a video becomes a model's clip, which is kept in the model's folder."""

from dataclasses import dataclass, fields
from typing import Any

from fused.io.picture import MEAN, STD, Size
from fused.rules import COUNT, POSITIVE, Rule, is_integer, is_number, one_of

SAMPLINGS = ("segments", "dense")
SHORT_VIDEOS = ("drop", "loop", "last")
CROPS = ("centre",)


def _is_size(value: Any) -> bool:
    """Return whether `value` is a positive integer or a pair of them."""
    sides = value if isinstance(value, tuple) and len(value) == 2 else (value,)
    return all(is_integer(side, 1) for side in sides)


FRAME_SIZE = Rule(_is_size, "pixels of a side, or [height, width]")


@dataclass(frozen=True)
class Preprocessing:
    """How frames are chosen from a video, and how they become the clip that a model was trained on.

    Raises ValueError at construction; the message names the field, its value and the allowed values.
    """

    frames: int | None  # of a clip; None: an image
    size: Size  # of a frame in pixels: one side, or (height, width)
    sampling: str = "segments"  # a frame of each of `frames` equal segments; "dense": frames at a fixed distance
    stride: int = 4  # that distance, in frames
    fps: int | float | None = None  # frames a second at which the video is shown before it is sampled; None: all its frames
    short: str = "drop"  # a video that is too short is left out; "loop" plays it again, "last" repeats its last frame
    crop: str = "centre"  # the middle of the frame, which is resized until `size` just fits into it
    mean: tuple[int | float, int | float, int | float] = MEAN  # of red, green and blue in 0..1, subtracted
    std: tuple[int | float, int | float, int | float] = STD  # by which the difference is divided

    def __post_init__(self) -> None:
        for f in fields(self):
            _RULES[f.name].check(f"preprocessing.{f.name}", getattr(self, f.name))


def _colours(holds: Any, allowed: str) -> Rule:
    """Return the rule for three numbers, for each of which `holds` is true."""
    return Rule(lambda v: isinstance(v, tuple) and len(v) == 3 and all(is_number(x, holds) for x in v), allowed)


_RULES = {
    "frames": COUNT.optional(),
    "size": FRAME_SIZE,
    "sampling": one_of(SAMPLINGS),
    "stride": COUNT,
    "fps": POSITIVE.optional(),
    "short": one_of(SHORT_VIDEOS),
    "crop": one_of(CROPS),
    "mean": _colours(lambda x: abs(x) < float("inf"), "three numbers, of red, green and blue"),
    "std": _colours(lambda x: 0 < x < float("inf"), "three positive numbers, of red, green and blue"),
}
