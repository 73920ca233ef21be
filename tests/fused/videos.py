"""Small videos for tests: synthetic ones, the shipped one in other containers, truncated ones."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch

from fused.io.video import count_frames, decode_frames
from harness.fixtures.video import SHIPPED, write

STEP = 4  # frame i of the synthetic videos has the grey value 20 + 4 i


def write_video(
    path: Path, frames: int = 50, width: int = 96, height: int = 64, side: int = 0, step: int = STEP
) -> Path:
    """Write a video whose grey value tells the frame, with `side` white columns at the left and right edge; return `path`."""
    grey = 20 + step * torch.arange(frames)
    images = grey[:, None, None, None].repeat(1, height, width, 3).to(torch.uint8)
    images[:, :, :side] = images[:, :, width - side :] = 255
    return write(path, images)


def remux(path: Path, source: Path = SHIPPED, *, skip: int = 0, **options: Any) -> Path:
    """Copy a file's video stream, without its first `skip` packets, into another container; return `path`."""
    with av.open(str(source)) as container, av.open(str(path), "w", options=options) as out:
        stream = out.add_stream_from_template(container.streams.video[0])
        for number, packet in enumerate(container.demux(container.streams.video[0])):
            if packet.dts is not None and number >= skip:
                packet.stream = stream
                out.mux(packet)
    return path


def patch(path: Path, place: int, data: bytes) -> Path:
    """Overwrite the bytes of a file from `place` on; return `path`."""
    content = bytearray(path.read_bytes())
    content[place : place + len(data)] = data
    path.write_bytes(content)
    return path


def cut(path: Path, fraction: float) -> Path:
    """Truncate a file to its first `fraction`; return `path`."""
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * fraction)])
    return path


def encode(
    path: Path, codec: str, *, frames: int = 20, width: int = 176, height: int = 144, rate: int = 25, gop: int = 5,
    times: Sequence[int] | None = None, container: str | None = None, options: dict[str, str] | None = None,
    muxing: dict[str, str] | None = None, aspect: Fraction | None = None, title: str | None = None,
) -> Path:  # fmt: skip
    """Write a moving pattern, every frame another, by any of FFmpeg's encoders; return `path`.

    `times` are the frames' times in 1/rate seconds, by default one after the other; `options` are the encoder's, `muxing` the
    container's; `aspect` is that of a pixel. Raises what PyAV raises where codec, size and container do not go together.
    """
    with av.open(str(path), "w", format=container, options=muxing or {}) as out:
        stream = out.add_stream(codec, rate=rate, options=options or {})
        formats = [f.name for f in av.Codec(codec, "w").video_formats or []]
        if aspect is not None:
            stream.sample_aspect_ratio = aspect
        if title is not None:
            out.metadata["title"] = title
        usual = [f for f in formats if f in ("yuv420p", "yuvj420p", "rgb24")]
        stream.pix_fmt = (usual + formats + ["yuv420p"])[0]
        stream.width, stream.height, stream.gop_size = width, height, gop
        stream.time_base, stream.codec_context.thread_count = Fraction(1, rate), 1  # some encoders wait for ever with more
        y, x = np.mgrid[:height, :width]
        for i in range(frames):
            grey = (40 + 8 * i + 40 * np.sin((x + 5 * i) / 9) * np.cos(y / 7)) % 256
            image = np.repeat(grey.astype(np.uint8)[..., None], 3, -1)
            frame = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(format=stream.pix_fmt)
            frame.pts, frame.time_base = (times[i] if times else i), Fraction(1, rate)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return path


def write_images(folder: Path, names: list[str], codec: str = "png") -> Path:
    """Write an image of 32 x 24 pixels for each name, whose grey value is 10 times its place in the list."""
    folder.mkdir(parents=True, exist_ok=True)
    for place, name in enumerate(names):
        with av.open(str(folder / name), "w", format="image2") as out:
            stream = out.add_stream(codec, rate=1)
            stream.width, stream.height = 32, 24
            stream.pix_fmt = {"mjpeg": "yuvj420p", "webp": "yuv420p", "libwebp": "yuv420p", "bmp": "bgr24"}.get(codec, "rgb24")
            grey = np.full((24, 32, 3), 10 * place, np.uint8)
            out.mux(stream.encode(av.VideoFrame.from_ndarray(grey, format="rgb24").reformat(format=stream.pix_fmt)))
            out.mux(stream.encode())
    return folder


def full_decode(path: Path, stream: int = 0) -> list[np.ndarray]:
    """Return all frames of a file as PyAV's plain loop shows them, RGB bytes (H, W, 3)."""
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=stream)]


def assert_frames_equal(path: Path, wanted: list[np.ndarray], reads_alone: bool = True) -> None:
    """Assert that the file has these frames, read all at once, and each by itself or with another."""
    total = len(wanted)
    assert count_frames(path) == total
    choices = [list(range(total))]
    if reads_alone:
        choices += [[0], [total - 1], [total // 2], [1, total - 2], list(range(0, total, 3))]
    for indices in choices:
        got = list(decode_frames(path, lambda n, times, indices=indices: indices))
        assert [number for number, _ in got] == sorted(set(indices))
        for number, image in got:
            assert np.array_equal(image.numpy(), wanted[number]), f"{path.name}: frame {number} of {total}"
