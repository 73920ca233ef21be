"""`FrameStream.reset` leaves the state of the video before."""

from contextlib import AbstractContextManager
from unittest import mock

from fused import FrameStream

WHERE = ("--subject", "videomamba", "--check", "stream", "--impl", "fused:torch", "--case", "*readout=tokens-tubelet2*")
FAILS = ("stream", "logits*")


def plant() -> AbstractContextManager[object]:
    """Return the context in which the bug is there."""

    def planted(stream: FrameStream) -> None:
        stream._tubelets = 0

    return mock.patch.object(FrameStream, "reset", planted)
