"""Frames and clips of a video, which is a file or a folder of images.

`read_clip` and `read_frames` take frames at even distances (`fused.io.sampling`), resize, crop and normalise them. The clip for
a trained model is read by `fused.io.preprocessing.Preprocessing.read`.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from fused.io.frame_folder import FrameFolder
from fused.io.picture import MEAN, STD, Size, centre_crop, height_width
from fused.io.sampling import Choice, Times, middle_frames
from fused.io.video_error import IndexMismatch, VideoError, VideoTooShort
from fused.io.video_file import VideoFile

__all__ = [
    "MEAN", "STD", "Times", "VideoError", "VideoTooShort", "count_frames", "decode_clip", "decode_frames", "middle_frames",
    "open_video", "read_clip", "read_frames",
]  # fmt: skip


def read_clip(
    path: str | Path, frames: int, size: Size, *, start: int | float = 0.0, stop: int | float = 1.0
) -> Float[Tensor, "3 T H W"]:
    """Return `frames` frames of the part of the video from `start` to `stop`: float32 (3, frames, height, width), normalised.

    `size` is the side of a square or (height, width). A frame is resized to just cover it (torch's bilinear interpolation
    with antialiasing, in float32, not rounded to bytes), and its middle is kept. Rotation and the shape of pixels are those
    that the file states. Only one frame at full size is in memory at a time, of some files (`VideoFile`) several.

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
    for name, value, least in (("frames", frames, frames), ("size", size, min(height_width(size)))):
        if least < 1:
            raise ValueError(f"{name} is {value}; allowed: at least 1")
    if not 0 <= start < stop <= 1:
        raise ValueError(f"start is {start} and stop {stop}; allowed: fractions of the video, 0 <= start < stop <= 1")
    path = Path(path)

    def middle(total: int, times: Times) -> list[int]:
        indices = middle_frames(total, frames, start, stop)
        if not indices:
            wrong = f"too short: {frames} frames were asked of its part from {start} to {stop}, and it has {total} frames"
            raise VideoTooShort(path, wrong, "ask for fewer frames, a larger part or a longer video")
        return indices

    images = decode_frames(path, middle)
    return (centre_crop(image, size) for _, image in images)


def count_frames(path: Path) -> int:
    """Return the number of frames that a video shows. Raises VideoError as `read_clip` does."""
    return len(open_video(path))


def open_video(
    path: Path, *, pattern: str | None = None, stated: int | None = None, decode_all: bool = False,
    choose: Choice | None = None,
) -> VideoFile | FrameFolder:  # fmt: skip
    """Return the video of a file or of a folder of images, indexed. Raises VideoError for one that cannot be read.

    `pattern` and `stated` concern a folder, see `FrameFolder`; `decode_all` and `choose` concern a file, see `VideoFile`.
    """
    if os.path.isdir(path):  # Path.is_dir raises an error for a name that is too long, or a folder that may not be read
        return FrameFolder(path, pattern=pattern, stated=stated)
    return VideoFile(path, decode_all=decode_all, choose=choose)


def decode_frames(
    path: Path, choose: Choice, *, pattern: str | None = None, stated: int | None = None
) -> Iterator[tuple[int, UInt8[Tensor, "H W 3"]]]:
    """Return an iterator over (number, RGB image) of the frames that `choose` names, in ascending order, each once.

    `choose` is called again if the file has another number of frames than it seemed at first; what it answers last, counts. It
    has to answer the same for the same frames. `pattern` and `stated` are those of `open_video`. The file is opened and indexed
    at once, and decoded while iterating.

    Raises VideoError for what cannot be decoded.
    """
    video = open_video(path, pattern=pattern, stated=stated, choose=choose)
    indices = _choose(video, choose)
    if isinstance(video, FrameFolder):
        return zip(indices, video.frames(indices), strict=True)
    return _decode(video, indices, choose)


def decode_clip(
    path: Path, choose: Choice, prepare: Callable[[Tensor], Tensor], *, pattern: str | None = None, stated: int | None = None
) -> Float[Tensor, "3 T *frame"] | UInt8[Tensor, "3 T *frame"]:
    """Return the frames that `choose` names, in its order, each (3, ...) as `prepare` makes it of the RGB image (H, W, 3).

    A frame may occur several times; it is decoded and prepared once. The arguments and errors are those of `decode_frames`.
    """
    places: Sequence[int] = ()

    def remember(total: int, times: Times) -> Sequence[int]:
        nonlocal places
        places = choose(total, times)
        return places

    prepared = [prepare(image) for _, image in decode_frames(path, remember, pattern=pattern, stated=stated)]
    order = {number: place for place, number in enumerate(sorted(set(places)))}
    return torch.stack([prepared[order[number]] for number in places], dim=1)


def _decode(video: VideoFile, indices: list[int], choose: Choice) -> Iterator[tuple[int, UInt8[Tensor, "H W 3"]]]:
    """Yield (number, image) of a file's frames; where the index turns out to be wrong, go on by a full decode.

    Numbers that were yielded before that are those of the index; the times of their frames are the same in both.
    """
    yielded = 0
    try:
        for index, image in zip(indices, video.frames(indices), strict=True):
            yield index, image
            yielded += 1
        return
    except IndexMismatch:
        exact = VideoFile(video.path, decode_all=True, choose=choose)
        again = _choose(exact, choose)
        if exact.stamps(again[:yielded]) != video.stamps(indices[:yielded]):
            raise
    for position, (index, image) in enumerate(zip(again, exact.frames(again), strict=True)):
        if position >= yielded:
            yield index, image


def _choose(video: VideoFile | FrameFolder, choose: Choice) -> list[int]:
    """Return the numbers of the frames that `choose` names, ascending, each once."""
    return sorted(set(choose(len(video), video.times)))
