"""The allowed values of every key of a training's configuration."""

from collections.abc import Callable, Mapping
from typing import Any

from fused.io.preprocessing import RULES as PREPROCESSING_RULES
from fused.models.videomamba.resize import INFLATIONS
from fused.rules import (
    COUNT,
    COUNT_OR_0,
    FLAG,
    FRACTION,
    POSITIVE,
    POSITIVE_OR_0,
    RATE,
    Rule,
    is_integer,
    is_number,
    one_of,
)
from fused.train.config_keys import TASKS
from fused.train.data.auto_augment import ALLOWED, AugmentPolicy
from fused.train.data.list_columns import COLUMNS, SEPARATORS, are_columns
from fused.train.language.options import LANGUAGE_RULES
from fused.train.objectives.losses import ALIGNMENTS
from fused.train.objectives.masks import MASKS
from fused.train.optim import DECAY_RULES

GATHERS = ("exact", "upstream")
PRECISIONS = ("float32", "bfloat16", "float16")
SIZES = ("tiny", "small", "middle", "base")


def _pair(holds: Callable[[Any, Any], bool], allowed: str) -> Rule:
    """Return a rule for two numbers, for which `holds(first, second)` is true."""

    def is_pair(value: Any) -> bool:
        two_numbers = isinstance(value, tuple) and len(value) == 2 and all(is_number(x, lambda _: True) for x in value)
        return two_numbers and holds(*value)

    return Rule(is_pair, allowed)


def _is_policy(value: Any) -> bool:
    """Return whether `value` is text that `AugmentPolicy` reads."""
    try:
        AugmentPolicy.parse(value)
    except (ValueError, AttributeError):  # AttributeError: the value is no text
        return False
    return True


def _text(allowed: str) -> Rule:
    """Return a rule for text that is not empty."""
    return Rule(lambda value: isinstance(value, str) and bool(value), allowed)


_FOLDER, _FILE, _PATTERN = _text("a folder"), _text("a path"), _text("a pattern of file names, such as img_*.jpg")
_VIDEO_RULES = {
    "separator": one_of((*SEPARATORS, *SEPARATORS.values())).optional(),
    "prefix": _FOLDER.optional(),
    "columns": Rule(are_columns, f"a list of {', '.join(COLUMNS)}, as the columns stand, with path").optional(),
    "frame_pattern": _PATTERN.optional(),
}
_NAME = _text("a name in fused.PRETRAINED, a folder or a file")
RULES = (
    LANGUAGE_RULES
    | dict.fromkeys(("out", "data.train"), _FOLDER)
    | dict.fromkeys(("start", "teacher"), _NAME.optional())
    | {
        f"data.{name}": PREPROCESSING_RULES[name]
        for name in ("size", "sampling", "stride", "fps", "short", "crop", "first_seconds")
    }
    | dict.fromkeys(("data.images", "data.images_prefix", "text.vocabulary", "text.start"), _FILE.optional())
    | dict.fromkeys(("loss.vtc", "loss.vtm", "loss.mlm", "loss.uta"), POSITIVE_OR_0)
    | {
        "data.paragraph": FLAG,
        "loss.gather": one_of(GATHERS),
        "text.length": Rule(lambda value: is_integer(value, 3), "an integer from 3 up: [CLS], a word, [SEP]"),
        "text.masked": FRACTION,
        "text.ids": one_of(("video", "caption")),
        "text.bert": Rule(lambda value: isinstance(value, Mapping), "a section of RetrievalConfig's fields"),
    }
    | {f"data.{val}{name}": rule for val in ("", "val_") for name, rule in _VIDEO_RULES.items()}
    | dict.fromkeys(("batch_size", "accumulate", "log_every", "keep", "data.repeats"), COUNT)
    | dict.fromkeys(("data.frames", "steps", "epochs", "evaluate_every", "save_every"), COUNT.optional())
    | dict.fromkeys(("data.workers", "optim.warmup_steps"), COUNT_OR_0)
    | dict.fromkeys(("data.flip", "data.erased", "optim.warmup_start", "optim.floor", "loss.label_smoothing"), FRACTION)
    | dict.fromkeys(("mix.probability", "mix.switch"), FRACTION)
    | dict.fromkeys(("optim.weight_decay", "loss.distillation", "mix.mixup", "mix.cutmix"), POSITIVE_OR_0)
    | dict.fromkeys(("deterministic", "tensorboard"), FLAG)
    | {
        "task": one_of(TASKS),
        "data.val": _FOLDER.optional(),
        "data.target_mean": Rule(lambda value: is_number(value, lambda x: abs(x) < float("inf")), "a number"),
        "data.target_std": POSITIVE,
        "data.augment": Rule(_is_policy, ALLOWED).optional(),
        "optim.warmup_epochs": POSITIVE_OR_0.optional(),
        "data.scale": _pair(lambda low, high: 0 < low <= high <= 1, "two shares of the frame's area, 0 < low <= high <= 1"),
        "model": Rule(lambda value: isinstance(value, Mapping), "a section of VideoMambaConfig's fields, and size"),
        "inflate": one_of(INFLATIONS),
        "optim.lr": POSITIVE,
        "optim.betas": _pair(lambda a, b: 0 <= a < 1 and 0 <= b < 1, "two rates from 0 up to, not including, 1"),
        "optim.layer_decay": Rule(lambda value: is_number(value, lambda x: 0 < x <= 1), "a number above 0, up to 1"),
        "optim.rule": one_of(DECAY_RULES),
        "optim.clip_grad": POSITIVE.optional(),
        "save_minutes": POSITIVE.optional(),
        "ema": Rule(lambda value: is_number(value, lambda x: 0 < x < 1), "a rate between 0 and 1, such as 0.9999").optional(),
        "loss.alignment": one_of(ALIGNMENTS),
        "mask.kind": one_of(("attention", *MASKS)),
        "mask.ratio": RATE,
        "mask.image_ratio": RATE,
        "precision": one_of(PRECISIONS),
        "device": one_of(("auto", "cpu", "cuda")),
        "parallel": one_of(("auto", "ddp", "fsdp")),
        "graph": one_of(("auto", "on", "off")),
        "backend": Rule(lambda value: isinstance(value, str), "a name of fused.backends, or 'auto'"),
        "seed": Rule(lambda value: is_integer(value, 0) and value < 2**32, "an integer from 0 to 2^32 - 1"),
    }
)
