"""Damaged video files: whatever is done to one, reading it is an error or gives frames that its decoder shows.

`nox -s fuzz_files` makes 2,000 of them, the tests 100. They are read in a process of their own, so that a crash or a hang of a
library is seen too.
"""

import multiprocessing
import os
import struct
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from videos import encode

FILES = int(os.environ.get("FUZZ_FILES", "100"))
PATIENCE = 60  # seconds for one file, on a busy machine
ENDED_THE_PROCESS = [
    ("flip", 0.99999, b"\xcf\xcc\xfeJ\xef\x89\xe3wP\xb6\x13\x98"),
    ("flip", 0.99999, b"\xcf\xcc\xfeJ\xef\x89\xe3wP\xb6\x13\x98"),
    ("flip", 0.8877872773884797, b"\xf5l\x96K\xedxQ\xbcP\xb0pNw\xf1\xb9"),
]
BASES = {
    "h264.mp4": ("libx264", {"x264-params": "keyint=8:bframes=2"}),
    "h264.mkv": ("libx264", {"x264-params": "keyint=8:open-gop=1:bframes=2"}),
    "h264.ts": ("libx264", {"x264-params": "keyint=8"}),
    "hevc.mp4": ("libx265", {"x265-params": "keyint=8:log-level=none"}),
    "vp9.webm": ("libvpx-vp9", {"b": "100k"}),
    "mpeg4.avi": ("mpeg4", {"bf": "2"}),
    "mpeg4.mp4": ("mpeg4", {}),
    "flv.flv": ("flv", {}),
    "gif.gif": ("gif", {}),
    "mjpeg.mov": ("mjpeg", {}),
}


def read_all(pipe: Connection) -> None:
    """Answer each path that comes through the pipe with "" or what is wrong with its reading."""
    import av
    import torch

    torch.set_num_threads(1)
    av.logging.set_level(av.logging.PANIC)
    while True:
        pipe.send(compare(Path(pipe.recv())))


def compare(path: Path) -> str:
    """Return what is wrong with the frames that are read from a file, "" if they are those of a full decode."""
    from fused.io.video import VideoError, decode_frames

    try:
        total: list[int] = []

        def choose(frames: int, times: Any) -> list[int]:
            total[:] = [frames]
            return sorted({0, frames // 3, frames // 2, frames - 1})

        got = [(number, hash(image.numpy().tobytes())) for number, image in decode_frames(path, choose)]
    except VideoError as error:
        return "" if str(path) in str(error) else f"the error does not name the file: {error}"
    shown, is_intact = full_decode(path)
    wrong = ""
    if strange := [number for number, image in got if image not in shown]:
        wrong = f"frames {strange} of {total[0]} are none that a full decode shows ({len(shown)} frames)"
    elif is_intact and (total[0] != len(shown) or any(shown[number] != image for number, image in got)):
        wrong = f"frames of {total[0]} are not numbered as those of a full decode, {len(shown)}"
    if wrong:
        begun, codec = shown_from_key_frames(path)
        if {image for _, image in got} <= begun.union(shown) or codec == "hevc" and not begun <= set(shown):
            return ""
    return wrong


def full_decode(path: Path) -> tuple[list[int], bool]:
    """Return hashes of all frames of a file, decoded from its start to its end past every error, and whether it is intact.

    It is not if there was an error, if it begins with a picture that needs others, or if a packet of HEVC shows nothing, of
    which the decoder says nothing.
    """
    import av

    from fused.io.video_stream import FrameConverter, OpenVideoStream

    shown, is_intact, has_begun, packets_read = list[int](), True, False, 0
    with OpenVideoStream(path) as (container, stream):
        converter = FrameConverter(stream)
        stream.codec_context.options = {}  # without a stop at the first error
        packets = container.demux(stream)
        while True:
            try:
                packet = next(packets)
                is_intact &= has_begun or packet.is_keyframe
                has_begun, packets_read = True, packets_read + bool(packet.size)
                for frame in packet.decode():
                    shown.append(hash(converter.convert(frame).numpy().tobytes()))
                    is_intact &= not frame.is_corrupt
            except StopIteration:
                return shown, is_intact and (stream.codec_context.name != "hevc" or len(shown) == packets_read)
            except (av.FFmpegError, ValueError):
                is_intact = False
                if len(shown) > 1000:
                    return shown, is_intact


def shown_from_key_frames(path: Path) -> tuple[set[int], str]:
    """Return hashes of the frames that the decoder shows when it is begun at each key frame, and the codec's name.

    Where damage has no error, a decoder shows otherwise what it shows from the start: it conceals a damaged picture by the one
    before. FFmpeg's decoder of HEVC leaves what it cannot decode as it was in memory, so that every decode differs.
    """
    import av

    from fused.io.video_stream import FrameConverter, OpenVideoStream

    with OpenVideoStream(path) as (container, stream):
        codec, keys = stream.codec_context.name, [i for i, packet in enumerate(container.demux(stream)) if packet.is_keyframe]
    shown: set[int] = set()
    for key in keys:
        with OpenVideoStream(path) as (container, stream):
            converter = FrameConverter(stream)
            for i, packet in enumerate(container.demux(stream)):
                try:
                    shown |= {hash(converter.convert(f).numpy().tobytes()) for f in (packet.decode() if i >= key else ())}
                except (av.FFmpegError, ValueError):
                    pass
    return shown, codec


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("bases")
    made = {name: encode(folder / name, codec, options=options, title="title") for name, (codec, options) in BASES.items()}
    return {name: path.read_bytes() for name, path in made.items()}


@pytest.fixture(scope="module")
def reader() -> Iterator[list[tuple[Any, Connection]]]:
    """Return a list with one process that reads files, and the pipe to it."""
    processes: list[tuple[Any, Connection]] = []
    yield processes
    for process, _ in processes:
        process.kill()
        process.join()


def start(processes: list[tuple[Any, Connection]]) -> tuple[Any, Connection]:
    """Return the reading process, or a new one."""
    if not processes:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=read_all, args=(theirs,), daemon=True)
        process.start()
        theirs.close()
        processes.append((process, ours))
    return processes[0]


@st.composite
def damages(draw: st.DrawFn) -> tuple[str, list[tuple[str, float, bytes]]]:
    """Draw a base file and what is done to it: (kind, place as a share of the file, bytes)."""
    kinds = st.sampled_from(["flip", "flip", "cut", "insert", "drop", "tag", "edit"])
    changes = st.tuples(kinds, st.floats(0, 1, exclude_max=True), st.binary(min_size=8, max_size=24))
    return draw(st.sampled_from(sorted(BASES))), draw(st.lists(changes, min_size=1, max_size=4))


def damage(data: bytes, changes: list[tuple[str, float, bytes]]) -> bytes:
    """Return the bytes of a file after the changes."""
    content = bytearray(data)
    for kind, share, noise in changes:
        place = int(share * len(content))
        if kind == "flip":
            content[place : place + 1 + noise[0] % 8] = noise[1 : 2 + noise[0] % 8]
        elif kind == "cut":
            del content[max(place, 16) :]
        elif kind == "insert":
            content[place:place] = noise
        elif kind == "drop":
            del content[place : place + int.from_bytes(noise[:2], "big") % 2000]
        elif kind == "tag":  # texts that are no UTF-8
            content = content.replace(b"title", noise[:5])
        elif (found := content.find(b"elst")) >= 0:  # another edit list
            duration, start = (int.from_bytes(noise[i : i + 4], "big") % 3000 for i in (0, 4))
            content[found + 12 : found + 20] = struct.pack(">ii", duration, start)
    return bytes(content)


@settings(
    max_examples=FILES, deadline=None, derandomize=FILES <= 100, database=None, phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
@given(damaged=damages())
@example(damaged=("mpeg4.avi", ENDED_THE_PROCESS))
def test_damaged_file(
    bases: dict[str, bytes], reader: list[tuple[Any, Connection]], tmp_path_factory: pytest.TempPathFactory,
    damaged: tuple[str, list[tuple[str, float, bytes]]],
) -> None:  # fmt: skip
    name, changes = damaged
    path = tmp_path_factory.getbasetemp() / f"damaged-{name}"
    path.write_bytes(damage(bases[name], changes))
    process, pipe = start(reader)
    pipe.send(str(path))
    answered = pipe.poll(PATIENCE)
    try:
        wrong = pipe.recv() if answered else "reading hangs"
    except EOFError:
        process.join()
        wrong = f"reading ends the process with {process.exitcode}"
    if not answered or not process.is_alive():
        process.kill()
        reader.clear()
    assert not wrong, f"{name} after {changes}: {wrong}; the file is {path}"
