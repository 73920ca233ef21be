"""The keys of a training's configuration that a task needs, that it reads, and that may change when a run is resumed."""

from dataclasses import fields

from fused.train.config_sections import DataConfig
from fused.train.language.options import LANGUAGE_TASKS, UNUSED_LANGUAGE_KEYS

CLIP_TASKS = ("finetune", "pretrain", "distill", "retrieval", "regress")  # on videos, of a VideoMamba
TASKS = (*CLIP_TASKS, *LANGUAGE_TASKS)
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
UNUSED_KEYS |= {
    task: (
        "model", "inflate", "teacher", "loss", "mix", "mask", "text", "ema", "accumulate", "graph", "evaluate_every",
        *(f"data.{f.name}" for f in fields(DataConfig) if f.name not in ("train", "prefix", "workers")), "optim.layer_decay",
        "optim.rule", *unused,
    )
    for task, unused in UNUSED_LANGUAGE_KEYS.items()
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


def is_read(key: str, task: str) -> bool:
    """Return whether a task reads a dotted key, or any key of a section."""
    return not any(key == unused or key.startswith(unused + ".") for unused in UNUSED_KEYS[task])
