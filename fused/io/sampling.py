"""Which frames of a video make a clip: one of each of equal segments, frames at a fixed distance, frames at a rate.

Frames are numbered from 0 in the order in which they are shown. The part from `start` to `stop`, fractions of all N frames,
holds the n frames round(start N) ... round(stop N) - 1. It is cut into T equal segments, and the middle frame of each is taken:

    index_i = round(start N) + floor((i + 1/2) n / T),   i = 0 ... T-1

Of several clips v = 0 ... V-1, each takes the frame at (v + 1) / (V + 1) of every segment; a single one takes the middle.
"""

import random
from bisect import bisect_right
from collections.abc import Callable, Sequence

Times = Sequence[int | float] | None
"""The seconds at which the frames of a video are shown, from its first frame; None for a folder of images."""

Choice = Callable[[int, Times], Sequence[int]]
"""A function that names frames, given the number of frames of a video and their times. It may raise VideoError."""


def middle_frames(total: int, frames: int, start: int | float = 0.0, stop: int | float = 1.0) -> list[int]:
    """Return the numbers of a clip's frames by the formula at the top of this file; none if the part has too few frames.

    `total` is the number of frames of the video, `frames` that of the clip.
    """
    first, end = round(start * total), round(stop * total)
    return [first + index for index in view_frames(end - first, frames, 0, 1)]


def view_frames(total: int, frames: int, view: int, views: int) -> list[int]:
    """Return the numbers of the frames of clip `view` of `views`, at (view + 1) / (views + 1) of each of `frames` segments.

    `total` is the number of frames of the video; with fewer than `frames` there is no clip, and the list is empty.
    """
    parts = views + 1
    return [(i * parts + view + 1) * total // (frames * parts) for i in range(frames)] if total >= frames else []


def segment_frames(total: int, frames: int, rng: random.Random) -> list[int]:
    """Return the number of a random frame of each of `frames` equal segments of a video; none if it has too few frames.

    Each of a segment's frames is equally likely. `total` is the number of frames of the video.
    """
    if total < frames:
        return []
    edges = [i * total // frames for i in range(frames + 1)]
    return [rng.randrange(first, end) for first, end in zip(edges, edges[1:], strict=False)]


def border_frames(total: int, frames: int, rng: random.Random | None, view: int = 0, views: int = 1) -> list[int]:
    """Return the numbers of `frames` frames by video_mm's rule; the last one is repeated if the video has fewer.

    Borders b_0 ... b_F are the integers below an even division of 0 ... total. Without `rng` it is frame
    floor((b_i + b_{i+1} - 1) / 2) of every stretch, of several views that at (view + 1) / (views + 1) of it. With `rng` it is a
    random frame of the stretch but its last; where a stretch has one frame, all are random frames of the video, in order.
    """
    count = min(frames, total)
    edges = [*(int(i * (total / count)) for i in range(count)), total]  # as NumPy divides, in floating point
    stretches = list(zip(edges, edges[1:], strict=False))
    if rng is None:
        found = [first + (end - 1 - first) * (view + 1) // (views + 1) for first, end in stretches]
    elif any(end - first < 2 for first, end in stretches):
        found = sorted(rng.sample(range(total), count))
    else:
        found = [rng.randrange(first, end - 1) for first, end in stretches]
    return found + [found[-1]] * (frames - count)


def dense_frames(
    total: int, frames: int, stride: int, rng: random.Random | None, view: int = 0, views: int = 1
) -> list[int]:
    """Return the numbers of `frames` frames that are `stride` apart; none if the video has fewer than that takes.

    Every possible start is equally likely. Without `rng`, clip `view` of `views` starts at (view + 1) / (views + 1) of the
    possible starts, a single one in the middle. `total` is the number of frames of the video.
    """
    starts = total - (frames - 1) * stride
    if starts < 1:
        return []
    first = rng.randrange(starts) if rng else (starts - 1) * (view + 1) // (views + 1)
    return [first + i * stride for i in range(frames)]


def frames_at_rate(times: Sequence[int | float], fps: int | float) -> list[int]:
    """Return the number of the frame that is seen at 0, 1 / fps, 2 / fps, ... seconds after the first.

    `times` are the seconds at which the frames are shown, ascending from 0. The last frame is shown as long as the one before.
    """
    last = times[-1] - times[-2] if len(times) > 1 else 0.0
    tick = 1e-6  # times are rounded in the file's units
    count = max(1, int((times[-1] + last) * fps + tick))
    return [bisect_right(times, k / fps + tick) - 1 for k in range(count)]
