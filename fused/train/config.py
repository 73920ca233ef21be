"""The configuration of a training: every key, its default, and its allowed values."""

from collections.abc import Callable, Mapping
from dataclasses import InitVar, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from fused.io.picture import Size, height_width
from fused.io.preprocessing import RULES as PREPROCESSING_RULES
from fused.io.preprocessing import Preprocessing
from fused.models.retrieval.config import RetrievalConfig
from fused.models.videomamba.config import VideoMambaConfig
from fused.models.videomamba.published import PRETRAINED
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
    invalid,
    is_integer,
    is_number,
    one_of,
)
from fused.train.data.auto_augment import ALLOWED, AugmentPolicy
from fused.train.data.list_columns import COLUMNS, SEPARATORS, are_columns
from fused.train.language.options import LANGUAGE_RULES, LANGUAGE_TASKS, UNUSED_LANGUAGE_KEYS, LanguageConfig
from fused.train.objectives.losses import ALIGNMENTS
from fused.train.optim import DECAY_RULES
from fused.train.unknown_key import unknown_key

CLIP_TASKS = ("finetune", "pretrain", "distill", "retrieval", "regress")  # on videos, of a VideoMamba
TASKS = (*CLIP_TASKS, *LANGUAGE_TASKS)
MASKS = ("attention", "random", "tube", "clip-row", "frame-row")
GATHERS = ("exact", "upstream")
PRECISIONS = ("float32", "bfloat16", "float16")
SIZES = ("tiny", "small", "middle", "base")
# Keys of data that validation videos may have of their own, as val_separator.
VAL_KEYS = ("separator", "prefix", "columns", "frame_pattern")
# Keys that only the task "retrieval" reads, those of "regress", and those of validation, which needs classes or targets.
RETRIEVAL_DATA_KEYS = tuple(f"data.{name}" for name in ("images", "images_prefix", "paragraph", "crop", "first_seconds"))
RETRIEVAL_KEYS = ("text", "loss.vtc", "loss.vtm", "loss.mlm", "loss.uta", "loss.gather", *RETRIEVAL_DATA_KEYS)
TARGET_KEYS = ("data.target_mean", "data.target_std")
VALIDATION_KEYS = ("data.val", *(f"data.val_{name}" for name in VAL_KEYS), "evaluate_every")
# Keys that a task does not read. Setting one is an error, and they are not printed.
UNUSED_KEYS = {
    "finetune": ("mask", "teacher", "loss.alignment", "loss.distillation", "language", *TARGET_KEYS, *RETRIEVAL_KEYS),
    "regress": ("mask", "mix", "teacher", "loss", "text", "language", *RETRIEVAL_DATA_KEYS),
    "pretrain": (
        "mix", "mask.image_ratio", "loss.label_smoothing", "loss.distillation", "language", *VALIDATION_KEYS, *TARGET_KEYS,
        *RETRIEVAL_KEYS,
    ),
    "distill": ("mask", "loss.alignment", "language", *TARGET_KEYS, *RETRIEVAL_KEYS),
    "retrieval": (
        "mix", "loss.label_smoothing", "loss.distillation", "language", "data.separator", "data.columns", "data.augment",
        "data.repeats", *VALIDATION_KEYS, *TARGET_KEYS,
    ),
}  # fmt: skip
# Keys without a default. `teacher`, for tasks that read it, and one of `steps` and `epochs` are needed too.
REQUIRED_KEYS = ("task", "out", "data.train")
# Keys in whose value ~ in front is the home folder.
PATH_KEYS = (
    "out", "start", "teacher", "data.train", "data.val", "data.prefix", "data.val_prefix", "data.images", "data.images_prefix",
    "text.vocabulary", "text.start",
)  # fmt: skip
# Fields of VideoMambaConfig that have a key of their own.
OWNERS = {"img_size": "data.size", "num_frames": "data.frames", "pretrained": "start"}
# Keys that may differ when a run is resumed. All others affect the bits of the weights.
RESUMABLE_KEYS = (
    "out", "steps", "epochs", "data.val", *(f"data.val_{name}" for name in VAL_KEYS), "data.workers", "parallel", "graph",
    "log_every", "save_every", "save_minutes", "keep", "evaluate_every", "tensorboard",
)  # fmt: skip


@dataclass(frozen=True)
class DataConfig:
    """Folders or lists of videos (see `list_videos`), and how clips are cut from videos (see `ClipFolder`)."""

    train: str | None = None
    val: str | None = None
    separator: str | None = None  # of a list: tab, comma, semicolon, blank; None: found out
    prefix: str | None = None  # the folder of a list's paths; None: that of the list
    columns: tuple[str, ...] | None = None  # of a list: path, label, frames, seconds, skip; None: found out
    frame_pattern: str | None = None  # of the images in folders of frames, such as img_*.jpg or img_%05d.jpg; None: all
    val_separator: str | None = None  # the same four of `val`; None: as those of `train`
    val_prefix: str | None = None
    val_columns: tuple[str, ...] | None = None
    val_frame_pattern: str | None = None
    target_mean: int | float = 0  # a regression learns (number - target_mean) / target_std of the numbers on the lists
    target_std: int | float = 1
    frames: int | None = 8  # of a clip; None: images, for an image model
    size: Size = 224  # pixels of a side, or [height, width]
    sampling: str = "segments"
    stride: int = 4  # frames from one to the next, for "dense" sampling
    fps: int | float | None = None  # frames a second at which the video is shown before it is sampled; None: all its frames
    short: str = "drop"  # what becomes of a video that is too short: drop, loop or last
    scale: tuple[int | float, int | float] = (0.5, 1.0)
    flip: int | float = 0.5
    erased: int | float = 0.0  # probability that a box of the clip is replaced by noise (random erasing)
    augment: str | None = None  # RandAugment such as rand-m7-n4-mstd0.5-inc1, or v0, for whole clips (`AugmentPolicy`)
    repeats: int = 1  # clips of each video in a step (repeated sampling); batch_size counts all of them
    workers: int = 2  # decoding processes for each training process
    images: str | None = None  # a file of images with captions, whose batches alternate with those of the videos
    images_prefix: str | None = None  # the folder of its paths; None: that of the file
    paragraph: bool = False  # whether a list of captions is one text, its sentences
    crop: str = "centre"  # crop and first_seconds: how the model's clips are made when it is tested, see `Preprocessing`
    first_seconds: int | float | None = None

    @property
    def preprocessing(self) -> Preprocessing:
        """How clips are made, as it is kept with the model."""
        return Preprocessing(
            self.frames, self.size, self.sampling, self.stride, self.fps, self.short, self.crop,
            first_seconds=self.first_seconds,
        )  # fmt: skip


UNUSED_KEYS |= {
    task: (
        "model", "inflate", "teacher", "loss", "mix", "mask", "text", "ema", "accumulate", "graph", "evaluate_every",
        *(f"data.{f.name}" for f in fields(DataConfig) if f.name not in ("train", "prefix", "workers")), "optim.layer_decay",
        "optim.rule", *unused,
    )
    for task, unused in UNUSED_LANGUAGE_KEYS.items()
}  # fmt: skip


@dataclass(frozen=True)
class OptimConfig:
    """AdamW, its groups (`parameter_groups`) and its schedule (`cosine_schedule`)."""

    lr: int | float = 1e-4
    weight_decay: int | float = 0.05
    betas: tuple[int | float, int | float] = (0.9, 0.999)
    layer_decay: int | float = 1.0
    rule: str = "corrected"
    warmup_steps: int = 0
    warmup_epochs: int | float | None = None  # instead of warmup_steps
    warmup_start: int | float = 0.0  # warmup_start and floor are fractions of lr
    floor: int | float = 0.01
    clip_grad: int | float | None = None  # upper limit of the norm of all gradients


@dataclass(frozen=True)
class LossConfig:
    """Options of the loss functions."""

    label_smoothing: int | float = 0.1
    alignment: str = "l2"
    distillation: int | float = 1.0  # weight relative to the cross-entropy
    vtc: int | float = 1.0  # vtc to uta: weights of contrast, matching, masked words and alignment with a teacher
    vtm: int | float = 1.0
    mlm: int | float = 1.0
    uta: int | float = 0.0
    gather: str = "exact"  # gradients of the contrast over several processes; "upstream": those divided by their number


@dataclass(frozen=True)
class MixConfig:
    """Options of `mix`: Beta parameters of mixup and cutmix (0 switches one off), and their probabilities."""

    mixup: int | float = 0.8
    cutmix: int | float = 1.0
    probability: int | float = 1.0
    switch: int | float = 0.5


@dataclass(frozen=True)
class MaskConfig:
    """The kind and ratio of the mask that hides tokens from the student; "attention" needs a CLIP teacher."""

    kind: str = "tube"
    ratio: int | float = 0.8
    image_ratio: int | float = 0.5  # of images, in a training of videos and images


@dataclass(frozen=True)
class TextConfig:
    """The texts of a video-text model, and its BERT."""

    vocabulary: str | None = None  # BERT's vocab.txt; None: that of the folder `start`
    start: str | None = None  # a file or folder of a plain BERT's weights
    length: int = 32  # word pieces of a text, [CLS] and [SEP] among them; longer ones are cut
    masked: int | float = 0.5  # share of words that are masked
    ids: str = "video"  # pairs of which "video" or "caption" are the same are right answers of each other
    bert: Mapping[str, Any] = field(default_factory=dict)  # fields of `RetrievalConfig`; without any, BERT base


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


def is_read(key: str, task: str) -> bool:
    """Return whether a task reads a dotted key, or any key of a section."""
    return not any(key == unused or key.startswith(unused + ".") for unused in UNUSED_KEYS[task])


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
    except (ValueError, AttributeError):  # the latter for what is no text
        return False
    return True


_FOLDER = Rule(lambda value: isinstance(value, str) and bool(value), "a folder")
_FILE = Rule(lambda value: isinstance(value, str) and bool(value), "a path")
_PATTERN = Rule(lambda value: isinstance(value, str) and bool(value), "a pattern of file names, such as img_*.jpg")
_VIDEO_RULES = {
    "separator": one_of((*SEPARATORS, *SEPARATORS.values())).optional(),
    "prefix": _FOLDER.optional(),
    "columns": Rule(are_columns, f"a list of {', '.join(COLUMNS)}, as the columns stand, with path").optional(),
    "frame_pattern": _PATTERN.optional(),
}
_NAME = Rule(lambda value: isinstance(value, str) and bool(value), "a name in fused.PRETRAINED, a folder or a file")

SECTIONS = {
    "data": DataConfig, "optim": OptimConfig, "loss": LossConfig, "mix": MixConfig, "mask": MaskConfig, "text": TextConfig,
    "language": LanguageConfig,
}  # fmt: skip
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
        "mask.kind": one_of(MASKS),
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
