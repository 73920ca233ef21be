"""The configuration of a training: its keys without a section, and the dependence of keys on each other."""

from collections.abc import Mapping
from dataclasses import InitVar, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from fused.io.picture import Size, height_width
from fused.models.retrieval.config import RetrievalConfig
from fused.models.videomamba.config import VideoMambaConfig
from fused.models.videomamba.published import PRETRAINED
from fused.rules import invalid, is_integer, one_of
from fused.train.config_keys import OWNERS, REQUIRED_KEYS, UNUSED_KEYS, VAL_KEYS
from fused.train.config_rules import RULES, SIZES
from fused.train.config_sections import SECTIONS, DataConfig, LossConfig, MaskConfig, MixConfig, OptimConfig, TextConfig
from fused.train.language.options import LANGUAGE_TASKS, LanguageConfig
from fused.train.unknown_key import unknown_key


@dataclass(frozen=True)
class TrainConfig:
    """The configuration of a training, with all its sections.

    With `complete=False` keys that a training needs may be missing. Raises ValueError at construction; the message names the
    key, its value and the allowed values.
    """

    task: str | None = None
    out: str | None = None  # the run folder: configuration, log, checkpoints, model
    model: Mapping[str, Any] = field(default_factory=dict)  # fields of VideoMambaConfig, and `size`
    start: str | None = None  # initial weights: a name in fused.PRETRAINED, a folder of save_pretrained, a file
    inflate: str = "centre"  # how an image model's patches in `start` become those of clips: centre or mean
    teacher: str | None = None  # a name or folder likewise; for pretraining also a CLIP folder of transformers
    data: DataConfig = field(default_factory=DataConfig)
    batch_size: int = 8  # clips of one step, over all processes and micro-batches
    accumulate: int = 1  # micro-batches of a step in each process: less memory, the same batch
    steps: int | None = None
    epochs: int | None = None
    optim: OptimConfig = field(default_factory=OptimConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    mix: MixConfig = field(default_factory=MixConfig)
    mask: MaskConfig = field(default_factory=MaskConfig)
    text: TextConfig = field(default_factory=TextConfig)
    language: LanguageConfig = field(default_factory=LanguageConfig)
    ema: float | None = None  # rate of an exponential moving average of the weights, such as 0.9999
    precision: str = "float32"  # bfloat16, float16: autocast over float32 parameters; float16 with loss scaling
    backend: str = "auto"  # of the model, see fused.backends
    device: str = "auto"
    parallel: str = "auto"  # under torchrun: ddp or fsdp; auto: ddp if there are several processes
    graph: str = "auto"  # steps as CUDA graphs: auto (where that is possible), on (or an error), off; the bits are the same
    seed: int = 0
    deterministic: bool = False
    log_every: int = 10  # log_every, save_every and evaluate_every count steps
    save_every: int | None = 500
    save_minutes: int | float | None = 10  # a checkpoint that many minutes after the last one, besides those of save_every
    keep: int = 2  # checkpoints
    evaluate_every: int | None = None  # None: once, at the end
    tensorboard: bool = False
    complete: InitVar[bool] = True

    def __post_init__(self, complete: bool) -> None:
        values = flatten(self)
        for key, rule in RULES.items():
            if complete or values[key] is not None or key not in REQUIRED_KEYS:
                rule.check(key, values[key])
        if (self.steps is None) == (self.epochs is None) and (complete or self.steps is not None):
            raise ValueError(
                f"steps is {self.steps} and epochs is {self.epochs}; allowed: a number for one, none for the other"
            )
        if complete and self.task in LANGUAGE_TASKS and self.start is None:
            raise invalid("start", None, f"for task {self.task!r} the folder of a model")
        self._check_retrieval()
        needs_teacher = self.loss.uta > 0 if self.task == "retrieval" else self.task in ("pretrain", "distill")
        if complete and needs_teacher and self.teacher is None:
            raise invalid("teacher", None, f"for task {self.task!r} a folder or a name in fused.PRETRAINED")
        if self.task in ("pretrain", "retrieval") and self.data.frames is None:
            raise invalid("data.frames", None, f"a number for task {self.task!r}, whose model takes clips")
        for name in VAL_KEYS:
            value = getattr(self.data, f"val_{name}")
            if value is not None and self.data.val is None:
                raise invalid(f"data.val_{name}", value, "null without data.val")
        if self.batch_size % self.accumulate:
            raise invalid("accumulate", self.accumulate, f"a divisor of batch_size ({self.batch_size})")
        if self.batch_size % (self.accumulate * self.data.repeats):
            micro_batch = self.batch_size // self.accumulate
            raise invalid("data.repeats", self.data.repeats, f"a divisor of batch_size / accumulate ({micro_batch})")
        if self.optim.warmup_epochs is not None and self.optim.warmup_steps:
            allowed = f"null with optim.warmup_steps {self.optim.warmup_steps}"
            raise invalid("optim.warmup_epochs", self.optim.warmup_epochs, allowed)
        known = [f.name for f in fields(VideoMambaConfig)] + ["size"]
        for key, owner in OWNERS.items():
            if key in self.model:
                raise ValueError(f"model.{key} is {self.model[key]!r}; allowed: nothing, it follows from {owner}")
        for key in self.model:
            if key not in known:
                raise unknown_key(f"model.{key}", [f"model.{name}" for name in known], all_keys())
        one_of(SIZES).optional().check("model.size", self.model.get("size"))
        start = self.start
        if start is not None and self.model.get("size") is not None and (start in PRETRAINED or Path(start).is_dir()):
            raise invalid("model.size", self.model["size"], f"null, since start ({start}) says what the model is")
        # a folder says itself how large its patches are
        if (start is None or Path(start).is_file()) and self.model.get("stride") is None:
            _check_frame_size(self.data.size, self.model.get("patch_size", VideoMambaConfig.patch_size))

    def _check_retrieval(self) -> None:
        """Raise ValueError for losses and sizes of a video-text model that do not go together."""
        if self.task != "retrieval":
            return
        loss, known = self.loss, [f.name for f in fields(RetrievalConfig) if f.name not in ("video", "vocab_size")]
        if not loss.vtc + loss.vtm + loss.mlm + loss.uta:
            raise invalid("loss.vtc", 0, "a positive number for one of vtc, vtm, mlm and uta")
        if self.parallel == "fsdp":
            raise invalid("parallel", "fsdp", "'auto' or 'ddp' for task 'retrieval'")
        for key in self.text.bert:
            if key not in known:
                raise unknown_key(f"text.bert.{key}", [f"text.bert.{name}" for name in known], all_keys())

    def used_keys(self) -> dict[str, Any]:
        """Return every key that the task reads (all without a task), with its value, as nested dictionaries of plain values."""
        tree = _plain(asdict(self))
        for key in UNUSED_KEYS.get(str(self.task), ()):
            section, _, name = key.partition(".")
            if name:
                del tree[section][name]
            else:
                del tree[section]
        return tree


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Return dotted keys and their values, of a configuration or of its `used_keys`. `model` is one value."""
    items = tree.items() if isinstance(tree, Mapping) else ((f.name, getattr(tree, f.name)) for f in fields(tree))
    values: dict[str, Any] = {}
    for name, value in items:
        if name in SECTIONS and not prefix:
            values |= flatten(value, name + ".")
        else:
            values[prefix + name] = value
    return values


def all_keys() -> list[str]:
    """Return every dotted key that may be set, the model's fields included."""
    keys = []
    for f in fields(TrainConfig):
        if f.name == "model":
            keys += ["model.size", *(f"model.{inner.name}" for inner in fields(VideoMambaConfig) if inner.name not in OWNERS)]
        elif f.name in SECTIONS:
            keys += [f"{f.name}.{inner.name}" for inner in fields(SECTIONS[f.name])]
        else:
            keys.append(f.name)
    return keys


def _check_frame_size(size: Size, patch: object) -> None:
    """Raise ValueError unless patches of `patch` pixels fill frames of data.size. VideoMambaConfig checks `patch` itself."""
    if not isinstance(patch, int) or not is_integer(patch, 1):
        return
    for side in height_width(size):
        if side % patch:
            below = side // patch * patch
            near = f"{below} or {below + patch}" if below else str(patch)
            raise invalid("data.size", size, f"multiples of {patch}, the pixels of a patch's side; nearest to {side}: {near}")


def _plain(value: Any) -> Any:
    """Return a copy with dictionaries and lists in place of other mappings and tuples."""
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value
