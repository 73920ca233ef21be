"""The section `language` of a training's configuration, and the tasks that read it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fused.models.vamba.config import MIXER_FIELDS
from fused.rules import COUNT, FLAG, POSITIVE, POSITIVE_OR_0, RATE, Rule

LANGUAGE_TASKS = ("vamba-pretrain", "vamba-sft", "bimba-sft")
STAGES = {"vamba-pretrain": "pretrain", "vamba-sft": "sft"}
# Keys of the section that a task does not read, and those of other sections that none of the three reads.
_LORA = ("language.lora_rank", "language.lora_alpha", "language.lora_targets", "language.lora_dropout")
_DISTILLATION = ("language.distillation", "language.distillation_tokens", "language.distillation_shift")
_VAMBA = ("language.longest", "language.trainable", "language.mixer")
_UNREAD = ("language.time_instruction", *_LORA)
UNUSED_LANGUAGE_KEYS = {
    "vamba-pretrain": _UNREAD,
    "vamba-sft": (*_UNREAD, *_DISTILLATION, "language.mixer"),
    "bimba-sft": (*_VAMBA, *_DISTILLATION),
}
FRAMES = {"vamba-pretrain": 8, "vamba-sft": 64, "bimba-sft": 64}


def _are_names(value: Any) -> bool:
    return isinstance(value, tuple) and bool(value) and all(isinstance(name, str) and name for name in value)


@dataclass(frozen=True)
class LanguageConfig:
    """The making of rows of tokens from conversations, and the choice of parameters that learn."""

    frames: int | None = None  # of a video; None: 8 for vamba-pretrain, else 64
    longest: int | None = 640  # pixels: a Vamba's frame with a longer side is scaled to it; None: all stay
    length: int = 32768  # tokens of a row, text and video: a Vamba's samples are packed up to it; longer ones are left out
    trainable: tuple[str, ...] | None = None  # parts of the names of a Vamba's parameters that learn; None: those of the stage
    recompute: bool = True  # layers again in the backward: less memory, a third more time
    mixer: Mapping[str, Any] = field(default_factory=dict)  # keywords of Mamba2, for a Vamba that begins as a Qwen2-VL
    distillation: int | float = 0.0  # weight of the divergence from the stock model's likeliest tokens
    distillation_tokens: int = 100  # so many
    distillation_shift: bool = False  # compare logits one token before the learnt ones, which predict these; upstream: at them
    time_instruction: bool = True  # tell a BIMBA the times of the frames
    lora_rank: int = 128
    lora_alpha: int | float = 32
    lora_targets: tuple[str, ...] = ("q_proj", "v_proj")
    lora_dropout: int | float = 0.05


LANGUAGE_RULES = {
    "language.frames": COUNT.optional(),
    "language.longest": COUNT.optional(),
    "language.length": COUNT,
    "language.trainable": Rule(_are_names, "a list of parts of parameters' names, such as [cross_attn, alpha]").optional(),
    "language.recompute": FLAG,
    "language.mixer": Rule(
        lambda value: isinstance(value, Mapping) and set(value) <= MIXER_FIELDS, "keywords of Mamba2 with values"
    ),
    "language.distillation": POSITIVE_OR_0,
    "language.distillation_tokens": COUNT,
    "language.distillation_shift": FLAG,
    "language.time_instruction": FLAG,
    "language.lora_rank": COUNT,
    "language.lora_alpha": POSITIVE,
    "language.lora_targets": Rule(_are_names, "a list of names of the language model's layers, such as [q_proj, v_proj]"),
    "language.lora_dropout": RATE,
}
