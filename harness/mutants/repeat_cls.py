"""CLS enters with every chunk of a video, not with the first alone."""

from contextlib import AbstractContextManager
from unittest import mock

from fused.modules.span import Span

WHERE = ("--subject", "videomamba", "--check", "chunks", "--impl", "fused:torch", "--case", "*readout=last*")
FAILS = ("chunks", "grad cls_token")


def plant() -> AbstractContextManager[object]:
    """Return the context in which the bug is there."""
    return mock.patch.object(Span, "cls", 1)
