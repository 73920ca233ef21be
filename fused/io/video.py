"""Clips of videos as VideoMamba takes them: frames at even distances, resized, cropped and normalised.

A video is a file, or a folder of images. Frames are numbered from 0 in the order in which they are shown. The part from
`start` to `stop`, fractions of all N frames, holds the n frames round(start N) ... round(stop N) - 1. It is cut into T equal
segments, and the middle frame of each is taken:

    index_i = round(start N) + floor((i + 1/2) n / T),   i = 0 ... T-1
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from fused.io.frame_folder import FrameFolder
from fused.io.picture import MEAN, STD, Size, centre_crop, height_width
from fused.io.video_error import IndexMismatch, VideoError, VideoTooShort
from fused.io.video_file import VideoFile

__all__ = [
    "MEAN", "STD", "Times", "VideoError", "VideoTooShort", "count_frames", "decode_frames", "middle_frames", "open_video",
    "read_clip", "read_frames",
]  # fmt: skip

Times = Sequence[int | float] | None
"""The seconds at which the frames of a video are shown, from its first frame; None for a folder of images."""


def read_clip(
    path: str | Path, frames: int, size: Size, *, start: int | float = 0.0, stop: int | float = 1.0
) -> Float[Tensor, "3 T H W"]:
    """Return `frames` frames of the part of the video from `start` to `stop`: float32 (3, frames, height, width), normalised.

    `size` is the side of a square or (height, width). A frame is resized to just cover it (torch's bilinear interpolation
    with antialiasing, in float32, not rounded to bytes), and its middle is kept. Rotation and the shape of pixels are those
    that the file states. Only one frame at full size is in memory at a time.

    Raises VideoError if the file is missing, empty, truncated or corrupt as far as FFmpeg can tell, or has no video;
    VideoTooShort, a VideoError, for fewer frames in the part than asked for; ValueError for an argument out of range;
    ImportError without PyAV.
    """
    images = read_frames(path, frames, size, start=start, stop=stop)  # checks the arguments
    clip = torch.empty(3, frames, *height_width(size))
    for i, frame in enumerate(images):
        clip[:, i] = frame
    return clip


def read_frames(
    path: str | Path, frames: int, size: Size, *, start: int | float = 0.0, stop: int | float = 1.0
) -> Iterator[Float[Tensor, "3 H W"]]:
    """Return an iterator over the frames (3, height, width) of `read_clip`, decoded one by one, for a model that streams.

    Raises what `read_clip` raises: failures to decode while iterating, all others at once.
    """
    if frames < 1 or min(height_width(size)) < 1:
        raise ValueError(f"frames and size have to be at least 1, not {frames} and {size}")
    if not 0 <= start < stop <= 1:
        raise ValueError(f"start and stop are fractions of the video, 0 <= start < stop <= 1, not {start} and {stop}")
    path = Path(path)

    def middle(total: int, times: Times) -> list[int]:
        indices = middle_frames(total, frames, start, stop)
        if not indices:
            wrong = f"too short: {frames} frames were asked of its part from {start} to {stop}, and it has {total} frames"
            raise VideoTooShort(path, wrong, "ask for fewer frames, a larger part or a longer video")
        return indices

    images = decode_frames(path, middle)
    return (centre_crop(image, size) for _, image in images)


def middle_frames(total: int, frames: int, start: int | float = 0.0, stop: int | float = 1.0) -> list[int]:
    """Return the numbers of a clip's frames by the formula at the top of this file; none if the part has too few frames.

    `total` is the number of frames of the file, `frames` that of the clip.
    """
    first, end = round(start * total), round(stop * total)
    n = end - first
    return [first + (2 * i + 1) * n // (2 * frames) for i in range(frames)] if n >= frames else []


def count_frames(path: Path) -> int:
    """Return the number of frames that a video shows. Raises VideoError as `read_clip` does."""
    return len(open_video(path))


def open_video(
    path: Path, *, pattern: str | None = None, stated: int | None = None, decode_all: bool = False
) -> VideoFile | FrameFolder:
    """Return the video of a file or of a folder of images, indexed. Raises VideoError for one that cannot be read.

    `pattern` and `stated` concern a folder, see `FrameFolder`; `decode_all` concerns a file, see `VideoFile`.
    """
    if path.is_dir():
        return FrameFolder(path, pattern=pattern, stated=stated)
    return VideoFile(path, decode_all=decode_all)


def decode_frames(
    path: Path, choose: Callable[[int, Times], Sequence[int]], *, pattern: str | None = None, stated: int | None = None
) -> Iterator[tuple[int, UInt8[Tensor, "H W 3"]]]:
    """Return an iterator over (number, RGB image) of the frames that `choose` names, in ascending order, each once.

    `choose` is called with the number of frames and their times, and may raise; it is called a second time if decoding shows
    that the file has other frames than its packets announce, and has to answer the same for the same frames. `pattern` and
    `stated` are those of `open_video`. The file is opened and indexed at once, and decoded while iterating.

    Raises VideoError for what cannot be decoded.
    """
    video = open_video(path, pattern=pattern, stated=stated)
    indices = _choose(video, choose)
    if isinstance(video, FrameFolder):
        return zip(indices, video.frames(indices), strict=True)
    return _decode(video, indices, choose)


def _decode(
    video: VideoFile, indices: list[int], choose: Callable[[int, Times], Sequence[int]]
) -> Iterator[tuple[int, UInt8[Tensor, "H W 3"]]]:
    """Yield (number, image) of a file's frames; where the index turns out to be wrong, go on by a full decode."""
    yielded = 0
    try:
        for index, image in zip(indices, video.frames(indices), strict=True):
            yield index, image
            yielded += 1
        return
    except IndexMismatch:
        exact = VideoFile(video.path, decode_all=True)
        again = _choose(exact, choose)
        if exact.stamps(again[:yielded]) != video.stamps(indices[:yielded]):
            raise
    for position, (index, image) in enumerate(zip(again, exact.frames(again), strict=True)):
        if position >= yielded:
            yield index, image


def _choose(video: VideoFile | FrameFolder, choose: Callable[[int, Times], Sequence[int]]) -> list[int]:
    """Return the numbers of the frames that `choose` names, ascending, each once."""
    return sorted(set(choose(len(video), video.times)))
