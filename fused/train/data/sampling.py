"""Which frames of a video make a clip."""

import random
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fused.io.video import Times, VideoError, VideoTooShort, middle_frames


@dataclass(frozen=True)
class FrameSampling:
    """The rule by which `frames` frames are taken from a video.

    "segments" cuts the video into `frames` equal segments and takes a frame of each; "dense" takes frames that are `stride`
    apart. With `fps` the video is first shown at this rate: frame k is the one that is seen k / fps seconds after the first.
    A video with fewer frames than that takes is too short ("drop"), is repeated from its start ("loop"), or its last frame is
    repeated ("last").
    """

    frames: int
    kind: str = "segments"
    stride: int = 4
    fps: int | float | None = None
    short: str = "drop"

    def indices(self, path: Path, total: int, times: Times, rng: random.Random | None) -> list[int]:
        """Return the numbers of a clip's frames in the order of the clip; a short video's occur several times.

        `total` is the number of frames of the video and `times` their seconds. With `rng` every choice is random, without it
        the middle one. Raises VideoTooShort, with "drop", and VideoError for `fps` where the video states no times.
        """
        if self.fps is None:
            shown: Sequence[int] = range(total)
        elif times is None:
            raise VideoError(path, "a folder of images states no times", "allowed is fps=None, or a video file")
        else:
            shown = frames_at_rate(times, self.fps)
        n, least = len(shown), self.frames if self.kind == "segments" else (self.frames - 1) * self.stride + 1
        if n < least and self.short == "drop":
            apart = f", {self.frames} that are {self.stride} apart" if self.kind == "dense" else ""
            rate = "" if self.fps is None else f" at {self.fps} a second"
            allowed = f"allowed are videos of at least {least} frames{apart}{rate}; short=loop and short=last repeat frames"
            raise VideoTooShort(path, f"too short: it has {n} frames{rate}", allowed)
        length = max(n, least)
        if self.kind == "dense":
            places = dense_frames(length, self.frames, self.stride, rng)
        else:
            places = segment_frames(length, self.frames, rng) if rng else middle_frames(length, self.frames)
        return [shown[place % n if self.short == "loop" else min(place, n - 1)] for place in places]


def frames_at_rate(times: Sequence[int | float], fps: int | float) -> list[int]:
    """Return the number of the frame that is seen at 0, 1 / fps, 2 / fps, ... seconds after the first.

    `times` are the seconds at which the frames are shown, ascending from 0. The last frame is shown as long as the one before.
    """
    last = times[-1] - times[-2] if len(times) > 1 else 0.0
    tick = 1e-6  # times are rounded in the file's units
    count = max(1, int((times[-1] + last) * fps + tick))
    return [bisect_right(times, k / fps + tick) - 1 for k in range(count)]


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
