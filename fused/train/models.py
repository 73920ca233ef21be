"""The models that a configuration names: the student with its first weights, and the teacher that it learns from."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fused.models.videomamba.config import VideoMambaConfig
from fused.models.videomamba.load import load_checkpoint
from fused.models.videomamba.model import VideoMambaEncoder
from fused.train.config import TrainConfig
from fused.train.objectives.teachers import ClipTeacher


@dataclass(frozen=True)
class Teacher:
    """A frozen model: what it says of clips, and how large that is."""

    says: Callable[[Tensor], tuple[Tensor, Tensor | None]]  # features (K, B, L, C), attention (B, T, P) or None
    layers: int  # K
    width: int  # C
    grid: tuple[int, int, int]  # tubelets, rows, columns; L is 1 more than their product
    attention: bool  # whether it tells where it looks

    def check(self, student: VideoMambaConfig) -> None:
        """Raise ValueError unless the student has the same tokens."""
        if (student.tubelets, *student.grid) != self.grid:
            ours, theirs = ("{}x{}x{}".format(*grid) for grid in ((student.tubelets, *student.grid), self.grid))
            raise ValueError(f"teacher has {theirs} tokens in time, rows and columns, the model {ours}; allowed: as many")


def make_student(kind: Any, config: TrainConfig, follows: dict[str, Any]) -> Any:
    """The model, of class `kind`, with its first weights; `follows` are fields that data and teacher decide.

    Raises ValueError where the configuration wants them otherwise, and what loading weights raises.
    """
    for key, value in follows.items():
        if config.model.get(key, value) != value:
            raise ValueError(f"model.{key} is {config.model[key]!r}; allowed: {value}, which follows from data and teacher")
    given, start = _fields(config) | follows, config.start
    if start is not None and not Path(start).is_file():
        return kind.from_pretrained(start, backend=config.backend, **given)
    model = kind(getattr(VideoMambaConfig, config.model.get("size") or "tiny")(**given), backend=config.backend)
    if start is not None:
        load_checkpoint(model, start)
    return model


def _fields(config: TrainConfig) -> dict[str, Any]:
    """The fields of VideoMambaConfig that the configuration gives."""
    given = {key: value for key, value in config.model.items() if key != "size"}
    return given | {"img_size": config.data.size, "num_frames": config.data.frames}


def pretraining_teacher(config: TrainConfig, device: torch.device) -> Teacher:
    """The teacher of pretraining: CLIP, if the folder is one of transformers' models, else a VideoMamba."""
    about = Path(str(config.teacher)) / "config.json"
    if about.is_file() and "architectures" in json.loads(about.read_text()):
        return _clip_teacher(config, device)
    return videomamba_teacher(config, device)


def _clip_teacher(config: TrainConfig, device: torch.device) -> Teacher:
    """CLIP over every tubelet, as many of its last layers as model.clip_return_layer says."""
    student = VideoMambaConfig(**_fields(config))  # as far as a teacher has to know: its clips, tokens and layers
    clip = ClipTeacher.from_pretrained(str(config.teacher), student)
    clip.model.to(device)
    return Teacher(clip, len(clip.layers), clip.width, (student.tubelets, *student.grid), True)


def videomamba_teacher(config: TrainConfig, device: torch.device) -> Teacher:
    """A VideoMamba of either kind: its final-normed tokens, as one layer. Its heads are left out, nobody asks them."""
    asked: dict[str, Any] = {"clip_return_layer": 0, "add_pool_norm": False, "distill_dim": None}
    asked |= {"img_size": config.data.size, "num_frames": config.data.frames}
    model = VideoMambaEncoder.from_pretrained(str(config.teacher), backend=config.backend, **asked)
    model = model.to(device).requires_grad_(False)

    def says(clips: Tensor) -> tuple[Tensor, Tensor | None]:
        return model.encode(model.embed(clips))[0][None], None

    return Teacher(says, 1, model.config.embed_dim, (model.config.tubelets, *model.config.grid), False)
