"""A task: data that never run out, data that are held out, the model that learns it, and how much it has to learn."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Batch = tuple[Tensor, Tensor]  # clips or images, float32; classes, int64 (B,)


@dataclass(frozen=True)
class Data:
    """The data of a task: `draw(generator, count)` gives a fresh batch for training; `held_out` is never drawn from."""

    draw: Callable[[torch.Generator, int], Batch]
    held_out: Batch


@dataclass(frozen=True)
class Recipe:
    """A training: AdamW, a cosine with warm-up, `batch` drawn anew at each step.

    `bar` is the share of held-out answers that must be exceeded; None where the result may be anything.
    """

    steps: int
    batch: int
    lr: float
    bar: float | None


@dataclass(frozen=True)
class Task:
    """A task with its model and recipes. `config` holds the fields of a VideoMambaConfig, of either package.

    `fit` trains a model of another kind than a classifier, which the reference does not have; None: `harness.learning.fit.fit`.
    """

    name: str
    title: str
    config: dict[str, Any]
    data: Callable[[], Data]
    full: Recipe
    short: Recipe
    fit: Callable[..., Any] | None = None


def allowed(bar: float | None, count: int) -> float:
    """Return how many of `count` may be wrong if more than the share `bar` has to be right; infinite without a bar."""
    return math.inf if bar is None else math.ceil(count * (1 - bar) - 1e-9) - 1
