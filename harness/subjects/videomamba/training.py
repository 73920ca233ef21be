"""The training of a classifier that the checks `convergence` and `processes` ask for."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness.fixtures import functional_modules as modules
from harness.judge.case import Case
from reference.ops.dtypes import accumulation_dtype

QUARTERS = 4


def training_title() -> str:
    """Return the task in a few words, for plots."""
    return "which quarter of the film"


def learning_rate() -> float:
    """Return the rate of SGD with momentum."""
    return 0.002


def training_target(call: Callable[..., Any], case: Case, clip: Tensor) -> Tensor:
    """Return which quarter of the film each clip is of, int64 (B,)."""
    return torch.arange(case["B"]) * QUARTERS // case["B"]


def training_losses(model: nn.Module, case: Case, clip: Tensor, rows: list[int], target: Tensor) -> Tensor:
    """Return the cross entropy of every clip."""
    with modules.precision(case, {"clip": clip}):
        logits = model(clip)
    return F.cross_entropy(logits.to(accumulation_dtype(logits.dtype)), target, reduction="none")


def training_words(drawn: bool) -> tuple[str, ...]:
    """Return the words of a fine-tuning, without mixing of clips unless `drawn`."""
    return ("task=finetune",) if drawn else ("task=finetune", "mix.mixup=0", "mix.cutmix=0")


def first_steps() -> int:
    """Return one."""
    return 1


def needs_teacher() -> bool:
    """Return False."""
    return False
