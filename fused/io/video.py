"""Clips of video files as VideoMamba takes them: frames at even distances, resized, cropped and normalised.

Frames are numbered from 0 in display order. The part from `start` to `stop`, fractions of all N frames, holds the n frames
round(start N) ... round(stop N) - 1. It is cut into T equal segments, and the middle frame of each is taken:

    index_i = round(start N) + floor((i + 1/2) n / T),   i = 0 ... T-1
"""

import stat
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

MEAN = (0.485, 0.456, 0.406)  # of ImageNet's red, green and blue, in 0..1
STD = (0.229, 0.224, 0.225)

ALLOWED = "allowed is a complete video file in any container and codec that FFmpeg reads (mp4, mkv, webm, avi, ...)"


class VideoError(ValueError):
    """The error for a file that cannot give the clip: names the file, what is wrong with it and what is allowed."""

    def __init__(self, path: Path, wrong: str, allowed: str = ALLOWED) -> None:
        super().__init__(f"{path}: {wrong}; {allowed}")


class VideoTooShort(VideoError):
    """The error for an intact file with fewer frames than the clip needs."""


def read_clip(
    path: str | Path, frames: int, size: int, *, start: int | float = 0.0, stop: int | float = 1.0
) -> Float[Tensor, "3 T H W"]:
    """Return `frames` frames of the part of the video from `start` to `stop`: float32 (3, frames, size, size), normalised.

    The short side is resized to `size` (torch's bilinear interpolation with antialiasing, in float32, not rounded to
    bytes), and the middle of the long side is kept. Metadata for rotation and for pixels that are not square is ignored.
    Only one frame at full size is in memory at a time.

    Raises VideoError if the file is missing, empty, a folder, truncated or corrupt as far as FFmpeg can tell, or has no
    video; VideoTooShort, a VideoError, if it has fewer frames in the part than asked for; ValueError for an argument out of
    range; ImportError without PyAV.
    """
    clip = torch.empty(3, frames, size, size)
    for i, frame in enumerate(read_frames(path, frames, size, start=start, stop=stop)):
        clip[:, i] = frame
    return clip


def read_frames(
    path: str | Path, frames: int, size: int, *, start: int | float = 0.0, stop: int | float = 1.0
) -> Iterator[Float[Tensor, "3 H W"]]:
    """Return an iterator over the frames (3, size, size) of `read_clip`, decoded one by one, for a model that streams.

    Raises what `read_clip` raises: failures to decode while iterating, all others at once.
    """
    if frames < 1 or size < 1:
        raise ValueError(f"frames and size have to be at least 1, not {frames} and {size}")
    if not 0 <= start < stop <= 1:
        raise ValueError(f"start and stop are fractions of the video, 0 <= start < stop <= 1, not {start} and {stop}")
    path = Path(path)
    total = count_frames(path)
    indices = middle_frames(total, frames, start, stop)
    if not indices:
        wrong = f"too short: {frames} frames were asked of its part from {start} to {stop}, and it has {total} frames"
        raise VideoTooShort(path, wrong, "ask for fewer frames, a larger part or a longer video")

    return (centre_crop(image, size) for image in decode_frames(path, indices))


def middle_frames(total: int, frames: int, start: int | float = 0.0, stop: int | float = 1.0) -> list[int]:
    """Return the numbers of a clip's frames by the formula at the top of this file; none if the part has too few frames.

    `total` is the number of frames of the file, `frames` that of the clip.
    """
    first, end = round(start * total), round(stop * total)
    n = end - first
    return [first + (2 * i + 1) * n // (2 * frames) for i in range(frames)] if n >= frames else []


def count_frames(path: Path) -> int:
    """Return the number of frames of a file, by counting packets without decoding, since not every container states it.

    Raises VideoError as `read_clip` does.
    """
    try:
        status = path.stat()
    except FileNotFoundError as error:
        raise VideoError(path, "no such file") from error
    except OSError as error:
        raise VideoError(path, f"it cannot be opened ({error.strerror})") from error
    if stat.S_ISDIR(status.st_mode):
        raise VideoError(path, "a folder, not a file")
    if status.st_size == 0:
        raise VideoError(path, "the file is empty")
    av = _pyav()
    count, stored, end = 0, 0, 0.0
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise VideoError(path, "there is no video in it")
            video = container.streams.video[0]
            if not video.codec_context:
                raise VideoError(path, "there is no decoder for its video")
            stated, duration = video.frames, (container.duration or 0) / av.time_base
            for packet in container.demux():
                if packet.pts is not None and packet.time_base is not None:
                    end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
                if packet.stream.index == video.index and packet.size:
                    stored += 1
                    count += not packet.is_discard  # frames that an edit list cuts off are stored, but not shown
    except (av.FFmpegError, OSError) as error:
        raise VideoError(path, f"truncated, corrupt or no video at all ({error.strerror})") from error
    if stored < stated:
        raise VideoError(path, f"truncated: it states {stated} frames and holds {stored}")
    if end < duration - 1:  # Matroska states a duration only; streams of an intact file differ by less than a second
        raise VideoError(path, f"truncated: it states {duration:.1f} s and ends after {end:.1f} s")
    return count


def decode_frames(path: Path, indices: list[int]) -> Iterator[UInt8[Tensor, "H W 3"]]:
    """Yield the frames with these ascending numbers as RGB bytes, in one pass that ends at the last of them.

    `indices` holds at least one, all below `count_frames(path)`. Raises VideoError for what cannot be decoded.
    """
    av = _pyav()
    wanted, done, decoded = set(indices), 0, 0
    try:
        with av.open(str(path)) as container:
            video = container.streams.video[0]
            # By default FFmpeg conceals what it cannot decode, and with slice threads, PyAV's default, does not mark it:
            # of 40 copies of the shipped clip with 3000 random bytes, 20 passed unnoticed; with frame threads, none.
            video.codec_context.options = {"err_detect": "explode"}
            video.thread_type = "FRAME"
            video.codec_context.thread_count = min(torch.get_num_threads(), 16)  # one in a worker process of PyTorch
            for frame in container.decode(video):
                if frame.is_corrupt:  # so are those that are predicted from it, without a mark
                    raise VideoError(path, f"corrupt at frame {decoded}")
                if decoded in wanted:
                    yield torch.from_numpy(frame.to_ndarray(format="rgb24"))
                    done += 1
                decoded += 1
                if done == len(indices):
                    return
    except (av.FFmpegError, OSError) as error:
        raise VideoError(path, f"truncated or corrupt before frame {indices[done]} ({error.strerror})") from error
    raise VideoError(path, f"truncated or corrupt: {decoded} frames can be decoded, {indices[-1] + 1} are needed")


def centre_crop(image: UInt8[Tensor, "H W 3"], size: int) -> Float[Tensor, "3 size size"]:
    """Return the middle square of an image, resized to `size` and normalised, as `read_clip` does."""
    height, width = image.shape[:2]
    scale = size / min(height, width)
    x = resize(image, max(size, round(height * scale)), max(size, round(width * scale)))
    top, left = (x.shape[1] - size) // 2, (x.shape[2] - size) // 2
    return normalise(x[:, top : top + size, left : left + size])


def resize(image: UInt8[Tensor, "H W 3"], height: int, width: int) -> Float[Tensor, "3 height width"]:
    """Return the image with values from 0 to 1, resized bilinearly with antialiasing, in float32."""
    x = image.permute(2, 0, 1)[None].float() / 255
    return F.interpolate(x, size=(height, width), mode="bilinear", antialias=True, align_corners=False)[0]


def normalise(image: Float[Tensor, "3 H W"]) -> Float[Tensor, "3 H W"]:
    """Return an image of values from 0 to 1, minus ImageNet's mean, divided by its standard deviation."""
    return (image - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def _pyav() -> ModuleType:
    """Return the module of PyAV; raise ImportError with the command that installs it."""
    try:
        import av
    except ImportError as error:
        raise ImportError("reading a video needs PyAV: pip install 'videomamba-bench[train]'") from error
    return av
