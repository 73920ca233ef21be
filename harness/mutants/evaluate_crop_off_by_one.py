"""Crops of a frame begin a column too far to the right."""

from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

from torch import Tensor

from fused.io.views import Views

WHERE = ("--subject", "evaluation", "--check", "forward")
FAILS = ("forward", "probabilities")


def plant() -> AbstractContextManager[object]:
    """Return the context in which the bug is there."""
    crops_of = Views.crops_of

    def planted(views: Views, image: Tensor, *rest: Any, **options: Any) -> Tensor:
        return crops_of(views, image.roll(-1, dims=1).contiguous(), *rest, **options)

    return mock.patch.object(Views, "crops_of", planted)
