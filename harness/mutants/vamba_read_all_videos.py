"""A packed sample of Vamba reads the videos of the other samples in its row too."""

from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import fused.models.vamba.model
from fused.models.vamba.pattern import Pattern

WHERE = ("--subject", "vamba", "--impl", "fused:torch", "--case", "*-packed-*")
FAILS = ("forward", "logits")


def plant() -> AbstractContextManager[object]:
    """Return the context in which the bug is there."""

    def planted(*arguments: Any) -> Pattern:
        return Pattern()

    return mock.patch.object(fused.models.vamba.model, "cross_pattern", planted)
