"""The three tasks: which models they train, and the loss of a batch.

A task is a module around its student. `prepare` makes of a batch what `forward` needs: mixtures, masks,
what the teacher says. `forward` gives the loss and nothing else that has a gradient, so that it is what
DistributedDataParallel wraps.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checkpoint import load_checkpoint
from ..config import VideoMambaConfig
from ..rules import wrong
from ..videomamba import VideoMamba, VideoMambaEncoder
from .config import TrainConfig
from .losses import alignment_loss, distillation_loss
from .masks import attention_mask, clip_row_mask, frame_row_mask, keep_visible, random_mask, tube_mask
from .mix import mix
from .teachers import ClipTeacher

MASKS: dict[str, Callable[..., Tensor]] = {
    "random": random_mask, "tube": tube_mask, "clip-row": clip_row_mask, "frame-row": frame_row_mask
}  # fmt: skip

Parts = dict[str, Tensor]


@dataclass(frozen=True)
class Teacher:
    """A frozen model: what it says of clips, and how large that is."""

    says: Callable[[Tensor], tuple[Tensor, Tensor | None]]  # features (K, B, L, C), attention (B, T, P) or None
    layers: int  # K
    width: int  # C
    grid: tuple[int, int, int]  # tubelets, rows, columns; L is 1 more than their product

    def check(self, student: VideoMambaConfig) -> None:
        """Raise ValueError unless the student has the same tokens."""
        if (student.tubelets, *student.grid) != self.grid:
            ours, theirs = ("{}x{}x{}".format(*grid) for grid in ((student.tubelets, *student.grid), self.grid))
            raise ValueError(f"teacher has {theirs} tokens in time, rows and columns, the model {ours}; allowed: as many")


class Task(nn.Module):
    """A student and what is asked of it. `partial`: some parameters never get a gradient."""

    student: VideoMamba | VideoMambaEncoder
    partial = False

    def prepare(self, clips: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:
        """The arguments of `forward`, for clips (B, C, T, H, W) and labels (B,) int64; nothing of it has a gradient."""
        raise NotImplementedError

    def logits(self, clips: Tensor) -> Tensor:
        """(B, classes), to be judged by the labels; only of tasks with classes."""
        raise NotImplementedError


class Finetune(Task):
    """Cross-entropy with the labels, of clips that may be mixed."""

    def __init__(self, config: TrainConfig, classes: int) -> None:
        super().__init__()
        self.settings, self.classes = config, classes
        self.student = _student(VideoMamba, config, {"num_classes": classes, "distill_dim": None})
        if self.student.config.readout == "tokens":
            raise wrong("model.readout", "tokens", "'cls', 'mean' or 'last', which give a clip one answer")

    def prepare(self, clips: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:
        if len(clips) < 2:  # a clip that is alone has none to be mixed with
            return clips, labels
        how = self.settings.mix
        mixed = mix(clips, labels, self.classes, how.mixup, how.cutmix, how.probability, how.switch, generator)
        return mixed.clips, mixed.targets

    def forward(self, clips: Tensor, targets: Tensor) -> tuple[Tensor, Parts]:
        logits = self.student(clips).float()
        return F.cross_entropy(logits, targets, label_smoothing=self.settings.loss.label_smoothing), {}

    def logits(self, clips: Tensor) -> Tensor:
        return self.student(clips)


class Distill(Finetune):
    """Self-distillation: beside the labels, every token of a smaller teacher, which sees the same mixed clips."""

    def __init__(self, config: TrainConfig, classes: int, device: torch.device) -> None:
        nn.Module.__init__(self)
        self.settings, self.classes = config, classes
        self.teacher = _videomamba_teacher(config, device)
        self.student = _student(VideoMamba, config, {"num_classes": classes, "distill_dim": self.teacher.width})
        self.teacher.check(self.student.config)

    def prepare(self, clips: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:
        clips, targets = super().prepare(clips, labels, generator)
        return clips, targets, self.teacher.says(clips)[0][0]

    def forward(self, clips: Tensor, targets: Tensor, tokens: Tensor) -> tuple[Tensor, Parts]:  # type: ignore[override]
        out, how = self.student(clips), self.settings.loss
        loss = distillation_loss(out, targets, tokens, how.distillation, how.label_smoothing)
        return loss, {"distance": alignment_loss(out.features.detach(), tokens)}

    def logits(self, clips: Tensor) -> Tensor:
        return self.student(clips).logits


class Pretrain(Task):
    """Masked alignment: the student's features of visible tokens against those of a teacher that sees all."""

    partial = True  # features end before the last mixer, and before what pools: upstream's way

    def __init__(self, config: TrainConfig, device: torch.device) -> None:
        super().__init__()
        self.settings = config
        self.teacher = _teacher(config, device)
        follows = {"clip_return_layer": self.teacher.layers, "clip_output_dim": self.teacher.width}
        self.student = _student(VideoMambaEncoder, config, follows)
        self.teacher.check(self.student.config)

    def prepare(self, clips: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:
        features, attention = self.teacher.says(clips)
        how, config = self.settings.mask, self.student.config
        if how.kind == "attention":
            assert attention is not None  # _teacher has seen to it
            mask = attention_mask(attention, how.ratio, generator)
        else:
            mask = MASKS[how.kind](len(clips), (config.tubelets, *config.grid), how.ratio, generator)
        return clips, mask, keep_visible(features, mask)

    def forward(self, clips: Tensor, mask: Tensor, features: Tensor) -> tuple[Tensor, Parts]:
        return alignment_loss(self.student(clips, mask).clip, features, self.settings.loss.alignment), {}


def build(config: TrainConfig, classes: Sequence[str], device: torch.device) -> Task:
    """The task with its models on `device`, the student ready to train.

    Raises ValueError for a model, start or teacher that does not fit, FileNotFoundError, CheckpointError, ImportError.
    """
    if config.task == "pretrain":
        return Pretrain(config, device).to(device)
    if len(classes) < 2:
        raise ValueError(
            f"data.train is {config.data.train!r} with {len(classes)} classes; allowed: a folder for each of 2 or more"
        )
    task = Distill(config, len(classes), device) if config.task == "distill" else Finetune(config, len(classes))
    return task.to(device)


def _student(kind: Any, config: TrainConfig, follows: dict[str, Any]) -> Any:
    """The model with its first weights; `follows` are fields that data and teacher decide."""
    for key, value in follows.items():
        if config.model.get(key, value) != value:
            raise ValueError(f"model.{key} is {config.model[key]!r}; allowed: {value}, which follows from data and teacher")
    given, start = _fields(config) | follows, config.start
    if start is not None and not Path(start).is_file():
        return kind.from_pretrained(start, backend=config.backend, **given)
    model = kind(getattr(VideoMambaConfig, config.model.get("size", "tiny"))(**given), backend=config.backend)
    if start is not None:
        load_checkpoint(model, start)
    return model


def _fields(config: TrainConfig) -> dict[str, Any]:
    """The fields of VideoMambaConfig that the configuration gives."""
    given = {key: value for key, value in config.model.items() if key != "size"}
    return given | {"img_size": config.data.size, "num_frames": config.data.frames}


def _teacher(config: TrainConfig, device: torch.device) -> Teacher:
    """The teacher of pretraining: CLIP, if the folder is one of transformers' models, else a VideoMamba."""
    about = Path(str(config.teacher)) / "config.json"
    if about.is_file() and "architectures" in json.loads(about.read_text()):
        return _clip_teacher(config, device)
    if config.mask.kind == "attention":
        raise ValueError(
            f"mask.kind is 'attention'; allowed with the teacher {config.teacher}, which is a VideoMamba and has none: "
            f"{', '.join(MASKS)}"
        )
    return _videomamba_teacher(config, device)


def _clip_teacher(config: TrainConfig, device: torch.device) -> Teacher:
    """CLIP over every tubelet, as many of its last layers as model.clip_return_layer says."""
    student = VideoMambaConfig(**_fields(config))  # as far as a teacher has to know: its clips, tokens and layers
    clip = ClipTeacher.from_pretrained(str(config.teacher), student)
    clip.model.to(device)
    return Teacher(clip, len(clip.layers), clip.width, (student.tubelets, *student.grid))


def _videomamba_teacher(config: TrainConfig, device: torch.device) -> Teacher:
    """A VideoMamba of either kind: its final-normed tokens, as one layer. Its heads are left out, nobody asks them."""
    asked: dict[str, Any] = {"clip_return_layer": 0, "add_pool_norm": False, "distill_dim": None}
    asked |= {"img_size": config.data.size, "num_frames": config.data.frames}
    model = VideoMambaEncoder.from_pretrained(str(config.teacher), backend=config.backend, **asked)
    model = model.to(device).requires_grad_(False)

    def says(clips: Tensor) -> tuple[Tensor, Tensor | None]:
        return model.encode(model.embed(clips))[0][None], None

    return Teacher(says, 1, model.config.embed_dim, (model.config.tubelets, *model.config.grid))
