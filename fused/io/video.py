"""Clips of real videos, as VideoMamba takes them: frames at even distances, resized, cropped and normalised.

Frames are numbered from 0 as they are shown. The part from `start` to `stop`, fractions of all N frames, holds the
n frames round(start N) ... round(stop N) - 1. It is cut into T equal segments, and each gives its middle frame:

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
    """A file that cannot give the clip asked for: names the file, what is wrong with it and what is allowed."""

    def __init__(self, path: Path, wrong: str, allowed: str = ALLOWED) -> None:
        super().__init__(f"{path}: {wrong}; {allowed}")


def read_clip(
    path: str | Path, frames: int, size: int, *, start: int | float = 0.0, stop: int | float = 1.0
) -> Float[Tensor, "3 T H W"]:
    """`frames` frames of the part of the video from `start` to `stop`, each (3, size, size), float32, normalised.

    The short side is resized to `size` (torch's bilinear interpolation with antialiasing, in float32, not rounded to
    bytes), and the middle of the long side is kept. Marks of rotation and of pixels that are not square are not heeded.
    Only one frame at full size is in memory at a time.

    Raises VideoError if the file is missing, empty, a folder, truncated or corrupt as far as FFmpeg can tell, has no
    video or fewer frames in the part than asked for; ValueError for an argument out of range; ImportError without PyAV.
    """
    clip = torch.empty(3, frames, size, size)
    for i, frame in enumerate(read_frames(path, frames, size, start=start, stop=stop)):
        clip[:, i] = frame
    return clip


def read_frames(
    path: str | Path, frames: int, size: int, *, start: int | float = 0.0, stop: int | float = 1.0
) -> Iterator[Float[Tensor, "3 H W"]]:
    """The frames of `read_clip` one by one, as the decoder gives them: for a model that streams. Raises what `read_clip` does,
    before the first frame unless it is decoding that fails."""
    if frames < 1 or size < 1:
        raise ValueError(f"frames and size have to be at least 1, not {frames} and {size}")
    if not 0 <= start < stop <= 1:
        raise ValueError(f"start and stop are fractions of the video, 0 <= start < stop <= 1, not {start} and {stop}")
    path = Path(path)
    total = count_frames(path)
    indices = sample(total, frames, start, stop)
    if not indices:
        wrong = f"too short: {frames} frames were asked of its part from {start} to {stop}, and it has {total} frames"
        raise VideoError(path, wrong, "ask for fewer frames, a larger part or a longer video")

    return (central(image, size) for image in decode(path, indices))


def sample(total: int, frames: int, start: int | float = 0.0, stop: int | float = 1.0) -> list[int]:
    """Numbers of the frames that a clip is made of (see the top of the file), none if the part has too few."""
    first, end = round(start * total), round(stop * total)
    n = end - first
    return [first + (2 * i + 1) * n // (2 * frames) for i in range(frames)] if n >= frames else []


def count_frames(path: Path) -> int:
    """How many frames the file holds, by counting packets without decoding: not every container states it.

    Raises VideoError as `read_clip` does.
    """
    try:
        about = path.stat()
    except FileNotFoundError as error:
        raise VideoError(path, "no such file") from error
    except OSError as error:
        raise VideoError(path, f"it cannot be opened ({error.strerror})") from error
    if stat.S_ISDIR(about.st_mode):
        raise VideoError(path, "a folder, not a file")
    if about.st_size == 0:
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
                    count += not packet.is_discard  # what an edit list cuts off is stored, but not shown
    except (av.FFmpegError, OSError) as error:
        raise VideoError(path, f"truncated, corrupt or no video at all ({error.strerror})") from error
    if stored < stated:
        raise VideoError(path, f"truncated: it states {stated} frames and holds {stored}")
    if end < duration - 1:  # Matroska states a duration only; a second is more than streams differ by where it is whole
        raise VideoError(path, f"truncated: it states {duration:.1f} s and ends after {end:.1f} s")
    return count


def decode(path: Path, indices: list[int]) -> Iterator[UInt8[Tensor, "H W 3"]]:
    """The frames with these ascending numbers as RGB bytes, in one pass that ends at the last of them.

    `indices` holds at least one, all below `count_frames(path)`. Raises VideoError for what cannot be decoded.
    """
    av = _pyav()
    wanted, done, decoded = set(indices), 0, 0
    try:
        with av.open(str(path)) as container:
            video = container.streams.video[0]
            # Else FFmpeg paints over what it cannot decode, and its slice threads, PyAV's default, do not even mark it:
            # 20 of 40 copies of the shipped clip with 3000 random bytes in them went by, with frame threads none.
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


def central(image: UInt8[Tensor, "H W 3"], size: int) -> Float[Tensor, "3 size size"]:
    """The middle square of an image, resized to `size` and normalised: see `read_clip`."""
    height, width = image.shape[:2]
    scale = size / min(height, width)
    x = resized(image, max(size, round(height * scale)), max(size, round(width * scale)))
    top, left = (x.shape[1] - size) // 2, (x.shape[2] - size) // 2
    return normalised(x[:, top : top + size, left : left + size])


def resized(image: UInt8[Tensor, "H W 3"], height: int, width: int) -> Float[Tensor, "3 height width"]:
    """Bytes to values from 0 to 1, resized bilinearly with antialiasing, in float32."""
    x = image.permute(2, 0, 1)[None].float() / 255
    return F.interpolate(x, size=(height, width), mode="bilinear", antialias=True, align_corners=False)[0]


def normalised(image: Float[Tensor, "3 H W"]) -> Float[Tensor, "3 H W"]:
    """Values from 0 to 1 minus ImageNet's mean, over its standard deviation."""
    return (image - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def _pyav() -> ModuleType:
    try:
        import av
    except ImportError as error:
        raise ImportError("reading a video needs PyAV: pip install 'videomamba-bench[train]'") from error
    return av
