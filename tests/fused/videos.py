"""Small videos for tests: synthetic ones, the shipped one in other containers, truncated ones."""

from pathlib import Path
from typing import Any

import av
import torch

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


def remux(path: Path, **options: Any) -> Path:
    """Copy the shipped clip's video stream into another container; return `path`."""
    with av.open(str(SHIPPED)) as source, av.open(str(path), "w", options=options) as out:
        stream = out.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(source.streams.video[0]):
            if packet.dts is not None:
                packet.stream = stream
                out.mux(packet)
    return path


def cut(path: Path, fraction: float) -> Path:
    """Truncate a file to its first `fraction`; return `path`."""
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * fraction)])
    return path
