"""The views of a video that a model is tested on: several clips in time, several crops of each.

Upstream (video_sm of OpenGVLab/VideoMamba) tests with clips v = 0 ... V-1 of F frames of the N of a video. Its rules by name:

    sparse       index_i = min(round(s i) + floor(s (v + 1) / (V + 1)), N - 1),   s = (N - 1) / F; halves are rounded to even
    raw          index_i = floor(v N / (F V) + i N / F)        for Something-Something; view 0 begins with frame 0
    raw-middle   index_i = i floor(N / F) + floor(floor(N / F) / 2), one clip; of N < F frames the first is repeated in front

A frame is resized until its short side is that of the crop. Crop p of P is the square at floor(p free / (P - 1)) pixels along
the long side, which has `free` more pixels than the crop; a single crop is in the middle.
"""

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from fused.io.picture import height_width, normalise, resize_bicubic, resize_bytes, resize_to_cover
from fused.io.preprocessing import TICK, Preprocessing
from fused.io.sampling import Times
from fused.io.video import VideoError, decode_frames
from fused.rules import COUNT, POSITIVE, POSITIVE_OR_0, invalid, one_of

RESIZES = ("antialiased", "upstream", "imagenet")
CROP_RATIO = 0.875  # of "imagenet": the side of the crop, in short sides of the resized frame


def sparse_frames(total: int, frames: int, view: int, views: int) -> list[int]:
    """Return the frame numbers of clip `view` of `views` by upstream's rule "sparse"; a short video's occur several times."""
    segment = (total - 1) / frames
    return [min(round(segment * i) + int(segment / (views + 1) * (view + 1)), total - 1) for i in range(frames)]


def raw_frames(total: int, frames: int, view: int, views: int) -> list[int]:
    """Return the frame numbers of clip `view` of `views` by upstream's rule "raw"; a short video's occur several times."""
    tick = total / frames
    return [min(int(view * tick / views + tick * i), total - 1) for i in range(frames)]


def raw_middle_frames(total: int, frames: int, view: int, views: int) -> list[int]:
    """Return the frame numbers of the clip that upstream validates Something-Something by, its rule "raw-middle"."""
    tick = total // frames
    if not tick:
        return [0] * (frames - total) + list(range(total))
    return [i * tick + tick // 2 for i in range(frames)]


UPSTREAM_FRAMES: dict[str, Callable[[int, int, int, int], list[int]]] = {
    "sparse": sparse_frames, "raw": raw_frames, "raw-middle": raw_middle_frames
}  # fmt: skip
"""Upstream's rules for the frames of a clip, by name."""


@dataclass(frozen=True)
class Windows:
    """Parts of a long video, each of which is tested as a video of its own.

    A window begins every `every` seconds and holds the frames of the next `seconds`. One that the video's end cuts shorter than
    `least` is left out, unless it is the first. A video no longer than `seconds` is one window.
    """

    seconds: int | float = 60
    every: int | float = 16
    least: int | float = 30

    def __post_init__(self) -> None:
        for name, rule in (("seconds", POSITIVE), ("every", POSITIVE), ("least", POSITIVE_OR_0)):
            rule.check(f"windows.{name}", getattr(self, name))
        if self.least > self.seconds:
            raise invalid("windows.least", self.least, f"up to windows.seconds ({self.seconds})")

    def spans(self, times: tuple[float, ...]) -> list[tuple[int, int]]:
        """Return first and end frame of each window, for frames that are shown at these seconds, ascending from 0."""
        last = times[-1] - times[-2] if len(times) > 1 else 0.0
        duration, number = times[-1] + last, 0
        spans: list[tuple[int, int]] = []
        is_long = duration > self.seconds + TICK
        while number == 0 or (is_long and duration - number * self.every >= max(self.least - TICK, TICK)):
            start = number * self.every
            span = bisect_left(times, start - TICK), bisect_left(times, start + self.seconds - TICK)
            if span[0] < span[1]:
                spans.append(span)
            number += 1
        return spans


@dataclass(frozen=True)
class Views:
    """The views of a video: `clips` in time times `crops` of the frame, of every window.

    `frames` names the rule for the frames of a clip: "model" spreads clips by the model's `Preprocessing`, the others are
    upstream's, which use frames of a short video several times. `resize` is "antialiased", as training resizes frames;
    "upstream", as upstream does with videos: bytes, by OpenCV's bilinear rule without antialiasing; or "imagenet", as upstream
    does with images: bytes, bicubic with antialiasing, the short side 8/7 of the crop's. The latter two round the long side
    down.

    Raises ValueError at construction; the message names the field, its value and the allowed values.
    """

    clips: int = 1
    crops: int = 1
    frames: str = "model"
    resize: str = "antialiased"
    windows: Windows | None = None

    def __post_init__(self) -> None:
        for f in fields(self):
            if f.name in _RULES:
                _RULES[f.name].check(f"views.{f.name}", getattr(self, f.name))
        if self.frames == "raw-middle" and self.clips != 1:
            raise invalid("views.clips", self.clips, "1 with the frames of 'raw-middle'")

    def check(self, preprocessing: Preprocessing) -> None:
        """Raise ValueError for a preprocessing that upstream's rules do not go with."""
        if preprocessing.crop == "stretch" and (self.crops, self.resize) != (1, "antialiased"):
            allowed = "1, and the resize 'antialiased', of frames that are stretched to their size"
            raise invalid("views.crops", self.crops, allowed)
        height, width = height_width(preprocessing.size)
        if self.resize != "antialiased" and height != width:
            raise invalid("views.resize", self.resize, f"'antialiased' for frames of {height}x{width}; upstream's are squares")
        if self.frames != "model" and preprocessing.fps is not None:
            raise invalid("views.frames", self.frames, f"'model' where frames are taken at a rate (fps {preprocessing.fps})")

    def read(
        self, preprocessing: Preprocessing, path: str | Path, *, frame_pattern: str | None = None,
        stated_frames: int | None = None, as_bytes: bool = False,
    ) -> Float[Tensor, "V 3 *T height width"] | UInt8[Tensor, "V 3 *T height width"]:  # fmt: skip
        """Return the views of a video: (windows * clips * crops, 3, T, height, width) float32, normalised; crops vary fastest.

        Every frame is decoded and resized once. Without `preprocessing.frames`, for an image model, T is left out. With
        `as_bytes`, for any but "antialiased", they are bytes that are not normalised. Further arguments and errors are those of
        `Preprocessing.read`; VideoError is also raised for windows of a folder of images, which states no times.
        """
        path, clips = Path(path), list[list[int]]()

        def choose(total: int, times: Times) -> list[int]:
            clips[:] = self.frame_numbers(preprocessing, path, total, times)
            return [number for clip in clips for number in clip]

        images = decode_frames(path, choose, pattern=frame_pattern, stated=stated_frames)
        crops = [self.crops_of(image, preprocessing, as_bytes) for _, image in images]  # (crops, 3, height, width) each
        place = {number: i for i, number in enumerate(sorted({number for clip in clips for number in clip}))}
        views = torch.cat([torch.stack([crops[place[number]] for number in clip], dim=2) for clip in clips])
        return views if preprocessing.frames else views[:, :, 0]

    def frame_numbers(self, preprocessing: Preprocessing, path: Path, total: int, times: Times) -> list[list[int]]:
        """Return the frame numbers of each clip, windows first. `total` and `times` are those of the video.

        Raises VideoTooShort and VideoError as `Preprocessing.frame_numbers` does.
        """
        clips: list[list[int]] = []
        for start, end in self._spans(path, total, times):
            inner = None if times is None else [t - times[start] for t in times[start:end]]
            for view in range(self.clips):
                if self.frames == "model":
                    numbers = preprocessing.frame_numbers(path, end - start, inner, view=view, views=self.clips)
                else:
                    numbers = UPSTREAM_FRAMES[self.frames](end - start, preprocessing.frames or 1, view, self.clips)
                clips.append([start + number for number in numbers])
        return clips

    def crops_of(self, image: UInt8[Tensor, "H W 3"], preprocessing: Preprocessing, as_bytes: bool = False) -> Tensor:
        """Return the crops (crops, 3, height, width) of a frame, as `read` returns them."""
        if preprocessing.crop == "stretch":
            return preprocessing.prepare(image)[None]
        height, width = height_width(preprocessing.size)
        H, W = image.shape[:2]
        short = int(height / CROP_RATIO) if self.resize == "imagenet" else height
        resized = (short, int(short * W / H)) if H <= W else (int(short * H / W), short)
        if self.resize == "antialiased":
            x = resize_to_cover(image, preprocessing.size)
        else:
            x = (resize_bicubic if self.resize == "imagenet" else resize_bytes)(image, *resized)
        free = x.shape[1] - height, x.shape[2] - width
        places = [(p, self.crops - 1) for p in range(self.crops)] if self.crops > 1 else [(1, 2)]
        corners = [(p * free[0] // gaps, p * free[1] // gaps) for p, gaps in places]
        if self.resize == "imagenet" and self.crops == 1:
            corners = [(round(free[0] / 2), round(free[1] / 2))]  # as torchvision: halves to even
        crops = torch.stack([x[:, top : top + height, left : left + width] for top, left in corners])
        if as_bytes:
            return crops
        crops = crops.float() / 255 if crops.dtype == torch.uint8 else crops
        return normalise(crops, preprocessing.mean, preprocessing.std)

    def _spans(self, path: Path, total: int, times: Times) -> list[tuple[int, int]]:
        """Return first and end frame of each window; of the whole video without windows."""
        if self.windows is None:
            return [(0, total)]
        if times is None:
            raise VideoError(path, "a folder of images states no times", "windows need video files")
        return self.windows.spans(tuple(times))


_RULES = {
    "clips": COUNT,
    "crops": COUNT,
    "frames": one_of(("model", *UPSTREAM_FRAMES)),
    "resize": one_of(RESIZES),
}
