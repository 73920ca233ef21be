"""A video file that is open: its container, the video stream that a player shows, and its frames as they are shown."""

import struct
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from fused.io.video_error import VideoError

# With "explode" FFmpeg gives up a whole picture for damaged side data (SEI messages, tags), and its decoders of the H.263
# family can end the process. Without it, damaged pictures are still marked as corrupt, if decoded with frame threads.
SIDE_DATA_CODECS = ("h264", "hevc", "tiff")
H263_CODECS = ("mpeg4", "h263", "h263p", "flv", "msmpeg4v1", "msmpeg4v2", "msmpeg4", "wmv1", "wmv2")
LENIENT_CODECS = frozenset((*SIDE_DATA_CODECS, *H263_CODECS))
MAX_THREADS = 16
MAX_PIXELS = 2**27  # of a frame: a damaged header must not take all memory
SIDE_DATA_KINDS = 64  # more than FFmpeg numbers
ASPECTS = (Fraction(1, 10), Fraction(10))  # of a pixel, width over height; others are damage


class OpenVideoStream:
    """A context that opens a file, and gives its container and the video stream that a player shows, ready to decode.

    It is no generator: an exception that passes through one is kept alive, with the decoder's threads, until the garbage
    collector runs; and a process that is forked meanwhile waits for threads that it does not have.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> tuple[Any, Any]:
        av, path = import_av(), self._path
        if not path.exists():
            raise VideoError(path, "no such file")
        if not path.is_file():
            raise VideoError(path, "a folder, not a file" if path.is_dir() else "no file")
        if path.stat().st_size == 0:
            raise VideoError(path, "the file is empty")
        # an absolute path is not taken for an address, as "cam1-12:30" is; titles need not be UTF-8, nor names
        self._file = path.open("rb") if is_undecodable(str(path)) else None
        options = {} if _replaces_by_itself(av.__version__) else {"metadata_errors": "replace"}
        self._container = av.open(self._file or str(path.absolute()), **options)
        try:
            stream = self._choose_stream(av)
        except VideoError:
            self.__exit__()
            raise
        codec = stream.codec_context
        codec.thread_type = "FRAME"
        codec.thread_count = min(torch.get_num_threads(), MAX_THREADS)  # one in a worker process of PyTorch
        codec.options = {"max_pixels": str(MAX_PIXELS)}
        if codec.name not in LENIENT_CODECS:
            codec.options |= {"err_detect": "explode"}
        return self._container, stream

    def __exit__(self, *exception: object) -> None:
        self._container.close()
        self._container = None
        if self._file is not None:
            self._file.close()

    def _choose_stream(self, av: ModuleType) -> Any:
        """Return the stream that a player shows: no attached picture, the default one before others, then the largest."""
        streams = self._container.streams.video
        if not streams:
            raise VideoError(self._path, "there is no video in it")
        kinds = av.stream.Disposition
        stills = kinds.attached_pic | kinds.timed_thumbnails | kinds.still_image
        shown = [s for s in streams if not kinds(s.disposition) & stills]
        if not shown:
            raise VideoError(self._path, "there is no video in it, only a picture that is attached to it")
        readable = [s for s in shown if s.codec_context]
        if not readable:
            raise VideoError(self._path, "there is no decoder for its video")
        return max(readable, key=lambda s: (bool(kinds(s.disposition) & kinds.default), s.width * s.height))


class FrameConverter:
    """The conversion of the decoded frames of a video stream to what is shown."""

    def __init__(self, stream: Any) -> None:
        aspect = stream.sample_aspect_ratio or Fraction(1)
        self._aspect = aspect if ASPECTS[0] <= aspect <= ASPECTS[1] else Fraction(1)
        self._reformatter = import_av().video.reformatter.VideoReformatter()  # a frame's own makes threads for each frame
        self._matrix: tuple[int, int, int, int] | None = None
        self._is_first = True

    def convert(self, frame: Any) -> UInt8[Tensor, "H W 3"]:
        """Return a frame in RGB with square pixels, turned as the display matrix of the first frame says."""
        if self._is_first:  # asking for side data makes a reference cycle, which keeps the frame until it is collected
            self._matrix, self._is_first = _display_matrix(frame), False
        width = max(round(frame.width * self._aspect), 1)
        shown = self._reformatter.reformat(frame, width, frame.height, "rgb24")
        return torch.from_numpy(_turn(shown.to_ndarray(), self._matrix))


def import_av() -> ModuleType:
    """Return the module of PyAV; raise ImportError with the command that installs it."""
    try:
        import av
    except ImportError as error:
        raise ImportError("reading a video needs PyAV: pip install 'videomamba-bench[train]'") from error
    return av


def _replaces_by_itself(version: str) -> bool:
    """Return whether this PyAV reads titles that are no UTF-8 without being told to, as it does from 19 on."""
    return int(version.partition(".")[0]) >= 19


def is_undecodable(name: str) -> bool:
    """Return whether a name of the file system is no UTF-8, so that FFmpeg cannot be told it, nor a file of UTF-8 hold it."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return True
    return False


def _display_matrix(frame: Any) -> tuple[int, int, int, int] | None:
    """Return a, b, c, d of a frame's display matrix, None without one: (x, y) is shown at (a x + c y, b x + d y)."""
    try:
        data = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:  # PyAV does not know the kind of other side data, as EXIF of still images
        data = _without_unknown_side_data(frame).side_data.get("DISPLAYMATRIX")
    if data is None:
        return None
    a, b, _, c, d, *_ = struct.unpack("=9i", bytes(data)[:36])
    return a, b, c, d


def _without_unknown_side_data(frame: Any) -> Any:
    """Return a frame without side data of the kinds that FFmpeg has and this PyAV has no name for."""
    av = import_av()
    graph = av.filter.Graph()
    graph.threads = 1
    source = graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base)
    unknown = set(range(SIDE_DATA_KINDS)) - {kind.value for kind in av.sidedata.sidedata.Type}
    removals = [graph.add("sidedata", f"mode=delete:type={kind}") for kind in sorted(unknown)]
    graph.link_nodes(source, *removals, graph.add("buffersink")).configure()
    graph.push(frame)
    return graph.pull()


def _turn(image: np.ndarray, matrix: tuple[int, int, int, int] | None) -> np.ndarray:
    """Return an image (H, W, 3), contiguous, turned by quarter turns and mirrored as a display matrix says."""
    if matrix is None:
        return image
    a, b, c, d = matrix
    straight, across = abs(a) + abs(d), abs(b) + abs(c)
    if min(straight, across) > 0.04 * max(straight, across):  # no quarter turn, within a degree
        return image
    if across > straight:
        image, a, d = image.transpose(1, 0, 2), c, b
    return np.ascontiguousarray(image[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1])
