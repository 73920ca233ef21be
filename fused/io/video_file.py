"""The frames of a video file, numbered as a full decode shows them.

A packet is not a frame: codecs have packets that show nothing, edit lists and stream copies have packets that are not shown,
and the counts in headers can be wrong. Frames are therefore numbered by what the decoder shows, in order of presentation.

In MP4, MOV, Matroska and WebM, packets of H.264, HEVC, VP9 and AV1 carry the time of presentation of exactly one shown frame.
Such a file is indexed by its packets, without decoding. A frame is decoded from the key frame before it, and its time is
compared with the index. Every other file, and a file of these whose packets do not bear the rule out, is decoded to be indexed.
Frames are kept meanwhile that will be wanted if every packet shows one, which is mostly so. If not, the file is decoded again.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

from jaxtyping import UInt8
from torch import Tensor

from fused.io.packets import ends_before_its_segment, is_hidden_vp9, starts_anew
from fused.io.sampling import Choice
from fused.io.video_error import IndexMismatch, VideoError
from fused.io.video_stream import FrameConverter, OpenVideoStream

INDEXED_FORMATS = frozenset(("mov", "mp4", "matroska", "webm"))
INDEXED_CODECS = frozenset(("h264", "hevc", "vp9", "av1"))
MIN_PACKETS_SKIPPED = 4  # by a seek, which costs about as much as decoding a few packets
MAX_BYTES_KEPT = 2**27  # of frames from the decode that indexes a file


class Packet(NamedTuple):
    """One packet in the index, in the order of the file. Times are in the stream's units."""

    pts: int | None
    dts: int | None
    is_key: bool
    is_shown: bool  # False for a packet that an edit list takes out


class VideoFile:
    """A video file with numbered frames.

    `times` holds the seconds at which frames are shown, counted from the first frame. With `decode_all` the frames are found
    by a full decode, whatever the file. If the file has to be decoded to be indexed, frames that `choose` names are kept, up to
    128 MiB, until `frames` gives them out.

    Raises VideoError for a file that cannot be read, or that holds no video or no frame.
    """

    times: tuple[float, ...]

    def __init__(self, path: Path, *, decode_all: bool = False, choose: Choice | None = None) -> None:
        self.path = path
        self._packets: list[Packet] = []
        self._kept: dict[int, Tensor] = {}
        with _Errors(self.path, "in its index"), OpenVideoStream(self.path) as (container, stream):
            names = set(container.format.name.split(","))
            codec, ends_inside_picture = stream.codec_context, False
            for packet in container.demux(stream):
                if packet.size:
                    is_key = packet.is_keyframe and starts_anew(codec.name, codec.extradata, packet)
                    self._packets.append(Packet(packet.pts, packet.dts, is_key, not packet.is_discard))
                    ends_inside_picture = packet.is_corrupt
                    if codec.name == "vp9" and is_hidden_vp9(bytes(packet)):
                        decode_all = True
            if ends_inside_picture or "matroska" in names and ends_before_its_segment(path):
                raise VideoError(path, "truncated: it ends in the middle of a picture")
            indexed = bool(names & INDEXED_FORMATS) and codec.name in INDEXED_CODECS
            self._unit = stream.time_base or Fraction(1)
            self._rate = stream.average_rate or Fraction(25)
        self.is_indexed = indexed and not decode_all and self._has_one_frame_a_packet()
        shown = [p.pts for p in self._packets if p.is_shown]
        self._pts: Sequence[int | None] = shown if None in shown else sorted(pts for pts in shown if pts is not None)
        if not self.is_indexed:
            wanted = self._expect(choose) if choose and shown else set()
            with _Errors(self.path, "in its frames"):
                self._pts = self._keep(wanted)
        if not self._pts:
            raise VideoError(path, "there is no frame in it that can be shown")
        self.times = self._seconds()

    def __len__(self) -> int:
        return len(self._pts)

    def stamps(self, indices: Sequence[int]) -> list[int | None]:
        """Return the times of presentation of frames, in the stream's units, by which an index can be compared with another."""
        return [self._pts[i] for i in indices]

    def frames(self, indices: Sequence[int]) -> Iterator[UInt8[Tensor, "H W 3"]]:
        """Yield the frames with these strictly ascending numbers as RGB bytes, one at a time.

        A frame is turned as its display matrix says, widened to square pixels, and converted by the colour matrix and range
        that it states (BT.601 and limited range where it states none), as FFmpeg shows it. Raises VideoError for what cannot
        be decoded, IndexMismatch where the decoder shows other frames than the packets announce.
        """
        if self._kept.keys() >= set(indices):
            for index in indices:
                yield self._kept.pop(index)
            return
        last = indices[-1]
        with _Errors(self.path, f"before frame {last}"):
            if self.is_indexed:
                yield from self._indexed_frames(indices)
                return
            wanted, number = set(indices), -1
            for number, (_, image) in enumerate(self._decode_all(wanted, last)):  # noqa: B007
                if image is not None:
                    yield image
        if number < last:
            raise VideoError(self.path, f"truncated or corrupt: frame {last} cannot be decoded")

    def _has_one_frame_a_packet(self) -> bool:
        """Return whether every packet can be relied on to show one frame, from the first packet on."""
        stamps = [p.pts for p in self._packets if p.is_shown]
        if not stamps or None in stamps or len(set(stamps)) < len(stamps):
            return False
        first = self._packets[0]
        # frames before the first key frame in time need pictures that are not in the file
        return first.is_key and first.pts is not None and all(p.pts is None or p.pts >= first.pts for p in self._packets)

    def _seconds(self) -> tuple[float, ...]:
        """Return the time of each frame in seconds from the first; where a time is missing, from the average rate."""
        known = [pts for pts in self._pts if pts is not None]
        if len(known) < len(self._pts) or any(b <= a for a, b in zip(known, known[1:], strict=False)):
            return tuple(float(i / self._rate) for i in range(len(self._pts)))
        return tuple(float((pts - known[0]) * self._unit) for pts in known)

    def _expect(self, choose: Choice) -> set[int]:
        """Return the numbers of the frames that `choose` names if every packet shows one frame; none if that is too few."""
        try:
            return set(choose(len(self._pts), self._seconds()))
        except VideoError:
            return set()

    def _keep(self, wanted: set[int]) -> list[int | None]:
        """Return the times of all frames that the decoder shows; keep the images of `wanted` ones, unless they are large."""
        stamps, size = [], 0
        for number, (pts, image) in enumerate(self._decode_all(wanted)):
            stamps.append(pts)
            if image is not None:
                self._kept[number] = image
                size += image.numel()
                if size > MAX_BYTES_KEPT:
                    wanted.clear()
                    self._kept.clear()
        return stamps

    def _decode_all(
        self, wanted: set[int] | None = None, last: int | None = None
    ) -> Iterator[tuple[int | None, Tensor | None]]:
        """Yield (time, image) of every frame that the decoder shows, from the first key frame on.

        Only the images of `wanted` frames are converted, the others are None. Frames before the first key frame in time are
        left out if they need pictures that are not in the file.
        """
        has_key = any(p.is_key for p in self._packets)
        first: int | None = None
        number, started = 0, not has_key
        with OpenVideoStream(self.path) as (container, stream):
            converter = FrameConverter(stream)
            for packet in container.demux(stream):
                if not started:
                    if not packet.is_keyframe or not packet.size:
                        continue
                    started, first = True, packet.pts
                for frame in stream.codec_context.decode(packet if packet.size else None):
                    if frame.is_corrupt:  # so are those that are predicted from it, without a mark
                        if first is not None and frame.pts is not None and frame.pts < first:
                            continue
                        raise VideoError(self.path, f"corrupt at frame {number}")
                    yield frame.pts, converter.convert(frame) if wanted and number in wanted else None
                    number += 1
                    if last is not None and number > last:
                        return

    def _indexed_frames(self, indices: Sequence[int]) -> Iterator[UInt8[Tensor, "H W 3"]]:
        """Yield frames as `frames` does, each decoded from the key frame before it."""
        position = {p.pts: i for i, p in enumerate(self._packets)}
        keys = [(p.pts, i) for i, p in enumerate(self._packets) if p.is_key and p.pts is not None]
        key_times, key_positions = [pts for pts, _ in keys], [i for _, i in keys]
        known = set(self._pts)
        runs: list[tuple[int, list[int]]] = []  # the position of a key frame, and the times of frames that are decoded from it
        done = -1  # the last position that the run before takes
        for index in indices:
            pts = self._pts[index]
            assert pts is not None
            key = key_positions[max(bisect_right(key_times, pts) - 1, 0)]
            if not runs or key > done + MIN_PACKETS_SKIPPED:
                runs.append((key, []))
            runs[-1][1].append(pts)
            done = max(done, position[pts])
        with OpenVideoStream(self.path) as (container, stream):
            converter = FrameConverter(stream)
            for start, wanted in runs:
                for frame in self._run(container, stream, start, max(position[pts] for pts in wanted), set(wanted)):
                    if frame.pts not in known:
                        raise IndexMismatch(self.path, "its decoder shows a frame that its packets do not announce")
                    if frame.pts > wanted[0]:
                        break
                    if frame.is_corrupt:
                        wrong = f"corrupt at frame {self._pts.index(frame.pts)}"
                        # a stream that is refreshed step by step has key frames from which it cannot be decoded at once
                        raise IndexMismatch(self.path, wrong) if start else VideoError(self.path, wrong)
                    if frame.pts == wanted[0]:
                        del wanted[0]
                        yield converter.convert(frame)
                        if not wanted:
                            break
                if wanted:
                    raise IndexMismatch(self.path, f"frame {self._pts.index(wanted[0])} is not shown by the decoder")

    def _run(self, container: Any, stream: Any, start: int, stop: int, wanted: set[int]) -> Iterator[Any]:
        """Yield the decoder's frames for the packets from position `start`, a key frame, to `stop`."""
        first = self._packets[start]
        if start:
            stamps = [t for t in (first.dts, first.pts) if t is not None]
            container.seek(min(stamps), stream=stream)
        codec, here = stream.codec_context, -1
        for packet in container.demux(stream):
            if not packet.size:
                continue
            if here < 0:
                if (packet.pts, packet.dts) != (first.pts, first.dts):
                    if packet.dts is not None and first.dts is not None and packet.dts > first.dts:
                        raise IndexMismatch(self.path, "its key frames cannot be found by their times")
                    continue
                here = start
            # a frame that no other refers to is decoded only if it is wanted
            codec.skip_frame = "DEFAULT" if packet.pts in wanted else "NONREF"
            yield from codec.decode(packet)
            if here == stop:
                break
            here += 1
        yield from codec.decode(None)


def read_image(path: Path) -> UInt8[Tensor, "H W 3"]:
    """Return the picture in an image file, the first of several, as `VideoFile.frames` gives it, decoded once.

    Raises VideoError for a file that cannot be read.
    """
    with _Errors(path, "in its picture"), OpenVideoStream(path) as (container, stream):
        for packet in container.demux(stream):
            if packet.is_corrupt:
                raise VideoError(path, "truncated: it ends in the middle of a picture")
            for frame in stream.codec_context.decode(packet if packet.size else None):
                if frame.is_corrupt:
                    raise VideoError(path, "corrupt at frame 0")
                return FrameConverter(stream).convert(frame)
    raise VideoError(path, "there is no frame in it that can be shown")


class _Errors:
    """A context that turns whatever the library raises for a file that it cannot read into a VideoError."""

    def __init__(self, path: Path, where: str) -> None:
        self._path, self._where = path, where

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        reason = getattr(error, "strerror", None)
        if not isinstance(error, Exception) or isinstance(error, VideoError | ImportError):
            return
        if isinstance(error, MemoryError) and reason is None:  # the machine's; FFmpeg's is of a size that the file states
            return
        # FFmpeg's errors, the system's, and those of PyAV's code, as for text that is no UTF-8
        reason = reason or f"{type(error).__name__}: {error}"
        raise VideoError(self._path, f"truncated, corrupt or no video at all, {self._where} ({reason})") from error
