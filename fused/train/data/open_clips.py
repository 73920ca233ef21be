"""The videos of a training's configuration, opened."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fused.train.config import TrainConfig
from fused.train.config_keys import VAL_KEYS
from fused.train.data.clips import ClipFolder
from fused.train.data.first_look import try_videos
from fused.train.data.target_clips import TargetClips


def open_clips(config: TrainConfig, key: str, classes: Sequence[str] | None) -> ClipFolder:
    """Return the videos of data.train or data.val, as `key` says, of these classes (None: their own).

    Raises ValueError that names the key.
    """
    data = config.data
    options: dict[str, Any] = {
        "sampling": data.sampling, "stride": data.stride, "fps": data.fps, "short": data.short, "scale": data.scale,
        "flip": data.flip, "erased": data.erased, "augment": data.augment, "repeats": data.repeats,
        "seed": config.seed, "frame_pattern": data.frame_pattern,
        "dtype": torch.uint8 if key == "train" else torch.float32,
    }  # fmt: skip
    root = str(getattr(data, key))
    # beside a list, a folder does without the options of lists; two folders refuse them
    if not Path(root).is_dir() or all(Path(path).is_dir() for path in (data.train, data.val) if path is not None):
        options |= {"separator": data.separator, "prefix": data.prefix, "columns": data.columns}
    if key == "val":
        own = {name: getattr(data, f"val_{name}") for name in VAL_KEYS}
        options |= {name: value for name, value in own.items() if value is not None}
    try:
        kind: type[ClipFolder] = ClipFolder
        if config.task == "regress":
            kind, classes = TargetClips, ()
            options |= {"mean": data.target_mean, "std": data.target_std}
        folder = kind(root, data.frames, data.size, train=key == "train", classes=classes, **options)
        folder.notes += tuple(try_videos(folder))
        return folder
    except (ValueError, OSError) as error:
        raise ValueError(f"data.{key}: {error}") from error
