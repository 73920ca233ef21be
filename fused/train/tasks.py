"""The tasks finetune, regress, distill and pretrain: their models, and the loss of a batch; and the choice of a task."""

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused.models.videomamba.model import VideoMamba, VideoMambaEncoder
from fused.rules import invalid
from fused.runtime.dtypes import accumulation_dtype
from fused.train.config import TrainConfig
from fused.train.data.captioned import CaptionData
from fused.train.data.clips import ClipFolder
from fused.train.data.mixup import mix
from fused.train.data.target_clips import TargetClips
from fused.train.models import make_student, pretraining_teacher, videomamba_teacher
from fused.train.objectives.losses import alignment_loss, distillation_loss
from fused.train.retrieval import Retrieval
from fused.train.task import Metrics, Task
from fused.train.visible_targets import visible_targets

_log = logging.getLogger("fused")


class Finetune(Task):
    """Classification: cross-entropy with the labels, of clips that may be mixed."""

    student: VideoMamba

    def __init__(self, config: TrainConfig, classes: Sequence[str]) -> None:
        super().__init__()
        self.config, self.classes = config, len(classes)
        self.student = make_student(VideoMamba, config, {"num_classes": len(classes), "distill_dim": None})
        _name_classes(self.student, classes)
        _check_readout(self.student)

    def encode(self, labels: Tensor) -> Tensor:
        """Return weights (B, classes), or the class (1,) of a single clip."""
        return labels if len(labels) < 2 else F.one_hot(labels, self.classes).to(torch.float32)

    def prepare(self, clips: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Return clips (B, C, T, H, W), and weights (B, classes) or, for a single clip, its class (1,)."""
        if len(clips) < 2:  # a single clip has no other to be mixed with
            return clips, labels
        options = self.config.mix
        mixed = mix(
            clips, labels, self.classes, options.mixup, options.cutmix, options.probability, options.switch, generator
        )
        return mixed.clips, mixed.targets

    def forward(self, clips: Tensor, targets: Tensor) -> tuple[Tensor, Metrics]:
        """Return the cross-entropy (), for the output of `prepare`."""
        logits = self.student(clips)
        logits = logits.to(accumulation_dtype(logits.dtype))
        return F.cross_entropy(logits, targets, label_smoothing=self.config.loss.label_smoothing), {}

    def logits(self, clips: Tensor) -> Tensor:
        return self.student(clips)


class Regress(Task):
    """Regression: the squared difference of a model's one output and a target."""

    student: VideoMamba

    def __init__(self, config: TrainConfig, targets: Sequence[float]) -> None:
        super().__init__()
        self.targets = targets
        self.student = make_student(VideoMamba, config, {"num_classes": 1, "distill_dim": None})
        _check_readout(self.student)

    def encode(self, labels: Tensor) -> Tensor:
        """Return the targets (B,) of the videos of these indices, float32."""
        return torch.tensor([self.targets[i] for i in labels.tolist()], dtype=torch.float32)

    def prepare(self, clips: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Return clips (B, C, T, H, W) and targets (B,), as from `encode`."""
        return clips, labels

    def forward(self, clips: Tensor, targets: Tensor) -> tuple[Tensor, Metrics]:
        """Return the mean squared error (), for the output of `prepare`."""
        outputs = self.logits(clips)[:, 0]
        dtype = accumulation_dtype(outputs.dtype)
        return F.mse_loss(outputs.to(dtype), targets.to(dtype)), {}

    def logits(self, clips: Tensor) -> Tensor:
        """Return outputs (B, 1)."""
        return self.student(clips)


class Distill(Finetune):
    """Self-distillation: cross-entropy, and alignment of every token with a smaller teacher's for the same mixed clips."""

    def __init__(self, config: TrainConfig, classes: Sequence[str], device: torch.device) -> None:
        nn.Module.__init__(self)
        self.config, self.classes = config, len(classes)
        self.teacher = videomamba_teacher(config, device)
        self.student = make_student(VideoMamba, config, {"num_classes": len(classes), "distill_dim": self.teacher.width})
        _name_classes(self.student, classes)
        self.teacher.check_tokens(self.student.config)

    def prepare(self, clips: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Return clips and targets as `Finetune` does, and the teacher's tokens (B, L, C)."""
        clips, targets = super().prepare(clips, labels, generator)
        features, _ = self.teacher.forward(clips)
        return clips, targets, features[0]

    def forward(self, clips: Tensor, targets: Tensor, tokens: Tensor) -> tuple[Tensor, Metrics]:  # type: ignore[override]
        """Return the distillation loss (), and the distance () of the tokens; arguments are the output of `prepare`."""
        output, options = self.student(clips), self.config.loss
        loss = distillation_loss(output, targets, tokens, options.distillation, options.label_smoothing)
        return loss, {"distance": alignment_loss(output.features.detach(), tokens)}

    def logits(self, clips: Tensor) -> Tensor:
        return self.student(clips).logits


class Pretrain(Task):
    """Masked alignment: the student's features of visible tokens against those of a teacher that sees all tokens."""

    student: VideoMambaEncoder

    def __init__(self, config: TrainConfig, device: torch.device) -> None:
        super().__init__()
        self.config = config
        self.teacher = pretraining_teacher(config, device)
        required = {"clip_return_layer": self.teacher.layers, "clip_output_dim": self.teacher.width}
        self.student = make_student(VideoMambaEncoder, config, required)
        self.teacher.check_tokens(self.student.config)

    def prepare(self, clips: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Return clips (B, C, T, H, W), indices (B, V) of visible tokens, and the teacher's features (K, B, V, C) of them."""
        options = self.config.mask
        return clips, *visible_targets(self.teacher, clips, options.kind, options.ratio, generator)

    def forward(self, clips: Tensor, visible: Tensor, features: Tensor) -> tuple[Tensor, Metrics]:
        """Return the alignment loss (), for the output of `prepare`."""
        return alignment_loss(self.student(clips, visible=visible).clip, features, self.config.loss.alignment), {}


def build_task(
    config: TrainConfig, classes: Sequence[str], device: torch.device, data: CaptionData | ClipFolder | None = None
) -> Task:
    """Return the task with its models on `device`; `classes` are the names of the training data's classes.

    `data` is the training data, from which tasks without classes take captions or targets.

    Raises ValueError for a model, start or teacher that does not fit, FileNotFoundError, CheckpointError, ImportError.
    """
    if isinstance(data, CaptionData):
        return Retrieval(config, data, device).to(device)
    if isinstance(data, TargetClips):
        return Regress(config, data.targets).to(device)
    if config.task == "pretrain":
        return Pretrain(config, device).to(device)
    if len(classes) < 2:
        number = f"{len(classes)} class{'es' if len(classes) != 1 else ''}"
        needed = "a folder for each" if Path(str(config.data.train)).is_dir() else "a label in each line of the list"
        raise ValueError(f"data.train is {config.data.train!r} with {number}; allowed: 2 or more, {needed}")
    task = Distill(config, classes, device) if config.task == "distill" else Finetune(config, classes)
    return task.to(device)


def _check_readout(student: VideoMamba) -> None:
    """Raise ValueError for a model with readout "tokens", which has an output for each token."""
    if student.config.readout == "tokens":
        raise invalid("model.readout", "tokens", "'cls', 'mean' or 'last', which give a clip one answer")


def _name_classes(student: VideoMamba, classes: Sequence[str]) -> None:
    """Name the student's classes. A head that was trained for as many classes of other names is replaced by a new one."""
    if student.labels is not None and student.labels != tuple(classes):
        differing = next((old, new) for old, new in zip(student.labels, classes, strict=True) if old != new)
        _log.warning("start has other classes than data.train (%r, here %r): the head is left at init", *differing)
        student.reset_classifier(len(classes))
    student.labels = tuple(classes)
