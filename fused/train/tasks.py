"""The three tasks: which models they train, and the loss of a batch.

A task is a module around its student. `prepare` makes of a batch what `forward` needs: mixtures, masks, what the teacher
says. `forward` gives the loss and nothing else that has a gradient, so that it is what DistributedDataParallel wraps.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused.models.videomamba.model import VideoMamba, VideoMambaEncoder
from fused.rules import wrong
from fused.runtime.dtypes import accumulation_dtype
from fused.train.config import TrainConfig
from fused.train.data.mixup import mix
from fused.train.models import make_student, pretraining_teacher, videomamba_teacher
from fused.train.objectives.losses import alignment_loss, distillation_loss
from fused.train.objectives.masks import attention_mask, clip_row_mask, frame_row_mask, keep_visible, random_mask, tube_mask

MASKS: dict[str, Callable[..., Tensor]] = {
    "random": random_mask, "tube": tube_mask, "clip-row": clip_row_mask, "frame-row": frame_row_mask
}  # fmt: skip

Parts = dict[str, Tensor]


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
        self.student = make_student(VideoMamba, config, {"num_classes": classes, "distill_dim": None})
        if self.student.config.readout == "tokens":
            raise wrong("model.readout", "tokens", "'cls', 'mean' or 'last', which give a clip one answer")

    def prepare(self, clips: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:
        if len(clips) < 2:  # a clip that is alone has none to be mixed with
            return clips, labels
        how = self.settings.mix
        mixed = mix(clips, labels, self.classes, how.mixup, how.cutmix, how.probability, how.switch, generator)
        return mixed.clips, mixed.targets

    def forward(self, clips: Tensor, targets: Tensor) -> tuple[Tensor, Parts]:
        logits = self.student(clips)
        logits = logits.to(accumulation_dtype(logits.dtype))
        return F.cross_entropy(logits, targets, label_smoothing=self.settings.loss.label_smoothing), {}

    def logits(self, clips: Tensor) -> Tensor:
        return self.student(clips)


class Distill(Finetune):
    """Self-distillation: beside the labels, every token of a smaller teacher, which sees the same mixed clips."""

    def __init__(self, config: TrainConfig, classes: int, device: torch.device) -> None:
        nn.Module.__init__(self)
        self.settings, self.classes = config, classes
        self.teacher = videomamba_teacher(config, device)
        self.student = make_student(VideoMamba, config, {"num_classes": classes, "distill_dim": self.teacher.width})
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
        self.teacher = pretraining_teacher(config, device)
        if config.mask.kind == "attention" and not self.teacher.attention:
            raise wrong("mask.kind", "attention", f"with a VideoMamba as teacher, which has none, {', '.join(MASKS)}")
        follows = {"clip_return_layer": self.teacher.layers, "clip_output_dim": self.teacher.width}
        self.student = make_student(VideoMambaEncoder, config, follows)
        self.teacher.check(self.student.config)

    def prepare(self, clips: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:
        features, attention = self.teacher.says(clips)
        how, config = self.settings.mask, self.student.config
        if how.kind == "attention":
            assert attention is not None
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
