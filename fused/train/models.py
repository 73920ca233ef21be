"""The models of a configuration: the student with its initial weights, and the teacher."""

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
    """A frozen model and the sizes of its output for clips (B, C, T, H, W)."""

    forward: Callable[[Tensor], tuple[Tensor, Tensor | None]]  # features (K, B, L, C), attention (B, T, P) or None
    layers: int  # K
    width: int  # C
    grid: tuple[int, int, int]  # tubelets, rows, columns; L is their product + 1
    has_attention: bool

    def check_tokens(self, student: VideoMambaConfig) -> None:
        """Raise ValueError unless the student has the same grid of tokens."""
        if (student.tubelets, *student.grid) != self.grid:
            ours, theirs = ("{}x{}x{}".format(*grid) for grid in ((student.tubelets, *student.grid), self.grid))
            raise ValueError(f"teacher has {theirs} tokens in time, rows and columns, the model {ours}; allowed: as many")


def make_student(kind: Any, config: TrainConfig, required: dict[str, Any]) -> Any:
    """Return the model, of class `kind`, with its initial weights.

    `required` holds the fields of VideoMambaConfig that data and teacher determine. Raises ValueError where the configuration
    sets one of them otherwise, and the errors of loading weights.
    """
    for key, value in required.items():
        if config.model.get(key, value) != value:
            raise ValueError(f"model.{key} is {config.model[key]!r}; allowed: {value}, which follows from data and teacher")
    model_fields, start = _model_fields(config) | required, config.start
    if start is not None and not Path(start).is_file():
        return kind.from_pretrained(start, backend=config.backend, **model_fields)
    model_config = getattr(VideoMambaConfig, config.model.get("size") or "tiny")(**model_fields)
    model = kind(model_config, backend=config.backend)
    if start is not None:
        load_checkpoint(model, start)
    return model


def pretraining_teacher(config: TrainConfig, device: torch.device) -> Teacher:
    """Return the teacher of pretraining: CLIP if `teacher` is a folder of a transformers model, otherwise a VideoMamba."""
    description = Path(str(config.teacher)) / "config.json"
    if description.is_file() and "architectures" in json.loads(description.read_text()):
        return _clip_teacher(config, device)
    return videomamba_teacher(config, device)


def videomamba_teacher(config: TrainConfig, device: torch.device) -> Teacher:
    """Return a VideoMamba as teacher, of either class: its tokens after the final norm, as one layer, without its heads."""
    fields: dict[str, Any] = {"clip_return_layer": 0, "add_pool_norm": False, "distill_dim": None}
    fields |= {"img_size": config.data.size, "num_frames": config.data.frames}
    model = VideoMambaEncoder.from_pretrained(str(config.teacher), backend=config.backend, **fields)
    model = model.to(device).requires_grad_(False)

    def forward(clips: Tensor) -> tuple[Tensor, Tensor | None]:
        return model.encode(model.embed(clips))[0][None], None

    return Teacher(forward, 1, model.config.embed_dim, (model.config.tubelets, *model.config.grid), False)


def _clip_teacher(config: TrainConfig, device: torch.device) -> Teacher:
    """Return CLIP as teacher, with the last model.clip_return_layer of its layers."""
    # only the student's clips, tokens and layers matter here; the teacher determines its other fields
    student = VideoMambaConfig(**_model_fields(config))
    clip = ClipTeacher.from_pretrained(str(config.teacher), student)
    clip.model.to(device)
    return Teacher(clip, len(clip.layers), clip.width, (student.tubelets, *student.grid), True)


def _model_fields(config: TrainConfig) -> dict[str, Any]:
    """Return the fields of VideoMambaConfig that the configuration sets."""
    given = {key: value for key, value in config.model.items() if key != "size"}
    return given | {"img_size": config.data.size, "num_frames": config.data.frames}
