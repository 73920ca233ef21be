"""Small videos for tests: made, in other containers, cut off."""

import av
import torch

from harness.fixtures.video import SHIPPED, write

STEP = 4  # frame i of the made videos is the grey value 20 + 4 i


def write_video(path, frames=50, width=96, height=64, side=0, step=STEP):
    """A video whose frames tell their number: grey, and `side` columns at the left and right edge white."""
    grey = 20 + step * torch.arange(frames)
    images = grey[:, None, None, None].repeat(1, height, width, 3).to(torch.uint8)
    images[:, :, :side] = images[:, :, width - side :] = 255
    return write(path, images)


def remux(path, **options):
    """The shipped clip's video in another container, stream-copied."""
    with av.open(str(SHIPPED)) as source, av.open(str(path), "w", options=options) as out:
        stream = out.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(source.streams.video[0]):
            if packet.dts is not None:
                packet.stream = stream
                out.mux(packet)
    return path


def cut(path, fraction):
    """Leave the first `fraction` of a file."""
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * fraction)])
    return path
