"""Classes are numbered as in the list of videos, and not as in the model."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import fused.evaluate.run
from fused.evaluate.videos import Labelled

WHERE = ("--subject", "evaluation", "--check", "forward")
FAILS = ("forward", "labels")


def plant() -> AbstractContextManager[object]:
    """Return the context in which the bug is there."""
    listed = fused.evaluate.run.list_classified

    def planted(data: str | Path, names: Sequence[str], *rest: Any, **options: Any) -> tuple[list[Labelled], tuple[str, ...]]:
        videos, notes = listed(data, names, *rest, **options)
        known = sorted({names[int(video.label)] for video in videos})
        return [replace(video, label=known.index(names[int(video.label)])) for video in videos], notes

    return mock.patch.object(fused.evaluate.run, "list_classified", planted)
