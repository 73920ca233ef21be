"""The sections of a training's configuration: their keys and the defaults."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fused.io.picture import Size
from fused.io.preprocessing import Preprocessing
from fused.train.language.options import LanguageConfig


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
        """The making of clips, as it is kept with the model."""
        return Preprocessing(
            self.frames, self.size, self.sampling, self.stride, self.fps, self.short, self.crop,
            first_seconds=self.first_seconds,
        )  # fmt: skip


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


SECTIONS = {
    "data": DataConfig, "optim": OptimConfig, "loss": LossConfig, "mix": MixConfig, "mask": MaskConfig, "text": TextConfig,
    "language": LanguageConfig,
}  # fmt: skip
