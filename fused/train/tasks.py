"""The three tasks, finetune, distill and pretrain: their models, and the loss of a batch.

A task is a module that holds its student. `prepare` turns a batch into the arguments of `forward`: mixed clips, masks, the
teacher's output. `forward` returns the loss, and everything with a gradient happens in it, so that a CUDA graph can hold it.
"""

import logging
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused.models.videomamba.embedding import visible_tokens
from fused.models.videomamba.model import VideoMamba, VideoMambaEncoder
from fused.rules import invalid
from fused.runtime.dtypes import accumulation_dtype
from fused.train.config import TrainConfig
from fused.train.data.mixup import mix
from fused.train.models import make_student, pretraining_teacher, videomamba_teacher
from fused.train.objectives.losses import alignment_loss, distillation_loss
from fused.train.objectives.masks import attention_mask, clip_row_mask, frame_row_mask, keep_visible, random_mask, tube_mask

MASKS: dict[str, Callable[..., Tensor]] = {
    "random": random_mask, "tube": tube_mask, "clip-row": clip_row_mask, "frame-row": frame_row_mask
}  # fmt: skip

_log = logging.getLogger("fused")

Metrics = dict[str, Tensor]  # scalars () for the log


class Task(nn.Module):
    """A student and its training objective. `forward` returns the loss () and further metrics."""

    student: VideoMamba | VideoMambaEncoder
    unit = "clips"  # that are counted

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The modules whose parameters are gathered one after another where processes share them."""
        return list(self.student.layers)

    def encode(self, labels: Tensor) -> Tensor:
        """Return labels, int64 (B,) on the CPU, as `prepare` takes them: what has to look at them is done before the GPU."""
        return labels

    def prepare(self, clips: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Return the arguments of `forward`, none of which requires a gradient.

        `clips` is (B, C, T, H, W), `labels` int64 (B,) or as from `encode`, `generator` a CPU generator for all random choices.
        """
        raise NotImplementedError

    def logits(self, clips: Tensor) -> Tensor:
        """Return class logits (B, classes) for clips (B, C, T, H, W). Only tasks with classes have them."""
        raise NotImplementedError


class Finetune(Task):
    """Classification: cross-entropy with the labels, of clips that may be mixed."""

    student: VideoMamba

    def __init__(self, config: TrainConfig, classes: Sequence[str]) -> None:
        super().__init__()
        self.config, self.classes = config, len(classes)
        self.student = make_student(VideoMamba, config, {"num_classes": len(classes), "distill_dim": None})
        _name_classes(self.student, classes)
        if self.student.config.readout == "tokens":
            raise invalid("model.readout", "tokens", "'cls', 'mean' or 'last', which give a clip one answer")

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


    def __init__(self, config: TrainConfig, device: torch.device) -> None:
        super().__init__()
        self.config = config
        self.teacher = pretraining_teacher(config, device)
        if config.mask.kind == "attention" and not self.teacher.has_attention:
            raise invalid("mask.kind", "attention", f"with a VideoMamba as teacher, which has none, {', '.join(MASKS)}")
        required = {"clip_return_layer": self.teacher.layers, "clip_output_dim": self.teacher.width}
        self.student = make_student(VideoMambaEncoder, config, required)
        self.teacher.check_tokens(self.student.config)

    def prepare(self, clips: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Return clips (B, C, T, H, W), indices (B, V) of visible tokens, and the teacher's features (K, B, V, C) of them."""
        features, attention = self.teacher.forward(clips)
        options, student = self.config.mask, self.student.config
        if options.kind == "attention":
            assert attention is not None
            mask = attention_mask(attention, options.ratio, generator)
        else:
            mask = MASKS[options.kind](len(clips), (student.tubelets, *student.grid), options.ratio, generator)
        visible = visible_tokens(mask, len(clips), features.shape[-2], features.device)
        return clips, visible, keep_visible(features, mask)

    def forward(self, clips: Tensor, visible: Tensor, features: Tensor) -> tuple[Tensor, Metrics]:
        """Return the alignment loss (), for the output of `prepare`."""
        return alignment_loss(self.student(clips, visible=visible).clip, features, self.config.loss.alignment), {}


def build_task(config: TrainConfig, classes: Sequence[str], device: torch.device) -> Task:
    """Return the task with its models on `device`; `classes` are the names of the training data's classes.

    Raises ValueError for a model, start or teacher that does not fit, FileNotFoundError, CheckpointError, ImportError.
    """
    if config.task == "pretrain":
        return Pretrain(config, device).to(device)
    if len(classes) < 2:
        raise ValueError(
            f"data.train is {config.data.train!r} with {len(classes)} classes; allowed: a folder for each of 2 or more"
        )
    task = Distill(config, classes, device) if config.task == "distill" else Finetune(config, classes)
    return task.to(device)


def _name_classes(student: VideoMamba, classes: Sequence[str]) -> None:
    """Name the student's classes. A head that was trained for as many classes of other names is replaced by a new one."""
    if student.labels is not None and student.labels != tuple(classes):
        differing = next((old, new) for old, new in zip(student.labels, classes, strict=True) if old != new)
        _log.warning("start has other classes than data.train (%r, here %r): the head is left at init", *differing)
        student.reset_classifier(len(classes))
    student.labels = tuple(classes)
