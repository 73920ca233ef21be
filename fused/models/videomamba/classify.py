"""The most likely classes of a video file, by a trained classifier."""

from pathlib import Path

import torch
from torch import Tensor, nn

from fused.io.picture import height_width
from fused.io.preprocessing import Preprocessing
from fused.io.views import Views
from fused.models.videomamba.config import VideoMambaConfig
from fused.models.videomamba.model import DistillOutput, VideoMamba, VideoMambaEncoder
from fused.rules import check_integer


def classify(
    model: nn.Module, path: str | Path, top: int = 5, *, views: Views | None = None, frame_pattern: str | None = None
) -> list[tuple[str, float]]:
    """Return the names and probabilities of the `top` most likely classes of a video, the most likely first.

    `path` is a video file, or a folder of images (`frame_pattern`, such as "img_*.jpg", selects some). Clips are made by
    `model.preprocessing`; a model without one takes frames from equal segments, and their middles. Probabilities are the mean
    over `views` of the softmax in float32; without `views` there is one. A class without a name is its number.

    Raises TypeError for another model, ValueError for a model in training mode, for one of fewer than two classes or with
    readout "tokens", and for `top` below 1; VideoError as `Preprocessing.read` does; ImportError without PyAV.

        >>> fused.classify(model, "videos/new.mp4", top=1)
        [('archery', 0.93)]
    """
    check_integer("classify", "top", top, 1)
    model = check_classes(model)
    if model.training:
        raise ValueError("model is in training mode; allowed: eval mode, after model.eval()")
    preprocessing, views = preprocessing_of(model), views or Views()
    views.check(preprocessing)
    clips = views.read(preprocessing, path, frame_pattern=frame_pattern)
    with torch.no_grad():
        scores = torch.cat([view_logits(model, clip[None]) for clip in clips])
    probabilities = merge_views(scores)
    best = probabilities.topk(min(top, len(probabilities)))
    names = class_names(model)
    return [(names[i], p) for i, p in zip(best.indices.tolist(), best.values.tolist(), strict=True)]


def merge_views(logits: Tensor) -> Tensor:
    """Return the probabilities (classes,) of a video, for the logits (views, classes) of its views.

    They are the mean over the views of each view's softmax, in float32, as upstream merges views.
    """
    return logits.float().softmax(dim=-1).mean(dim=0)


def view_logits(model: VideoMamba, clips: Tensor) -> Tensor:
    """Return logits (B, num_classes) for clips (B, C, T, H, W), or images, moved to the model's device and dtype."""
    weight = model.cls_token
    output = model(clips.to(weight.device, weight.dtype))
    return output.logits if isinstance(output, DistillOutput) else output


def preprocessing_of(model: VideoMamba | VideoMambaEncoder) -> Preprocessing:
    """Return the model's preprocessing; for one that has none, the defaults with its number and size of frames.

    Raises ValueError for a preprocessing whose clips the model does not take.
    """
    config = model.config
    preprocessing = model.preprocessing or Preprocessing(config.num_frames, config.img_size)
    check_fits(preprocessing, config)
    return preprocessing


def check_fits(preprocessing: Preprocessing, config: VideoMambaConfig) -> None:
    """Raise ValueError unless a model takes the clips of a preprocessing, which are RGB."""
    if config.channels != 3:
        raise ValueError(f"model takes {config.channels} channels; allowed: 3, which are read from a video")
    if (preprocessing.frames, height_width(preprocessing.size)) != (config.num_frames, config.sides):
        found = f"preprocessing has {preprocessing.frames} frames of size {preprocessing.size}"
        raise ValueError(f"{found}; allowed: {config.num_frames} of {config.sides}, which the model takes")


def class_names(model: VideoMamba) -> tuple[str, ...]:
    """Return the names of the model's classes, in the order of its logits; without `model.labels` their numbers."""
    return model.labels or tuple(map(str, range(model.config.num_classes)))


def read_class_names(path: str | Path) -> list[str]:
    """Return the class names of a UTF-8 text file, one a line in the order of the logits. Empty lines are left out.

    Raises ValueError, which names the file, for one that is not there or no text.
    """
    try:
        return [name for line in Path(path).read_text(encoding="utf-8-sig").splitlines() if (name := line.strip())]
    except (OSError, UnicodeDecodeError) as error:
        allowed = "a text file with a class name in each line"
        raise ValueError(f"labels is {str(path)!r}, which cannot be read ({error}); allowed: {allowed}") from error


def check_classes(model: nn.Module) -> VideoMamba:
    """Return the model. Raise TypeError and ValueError as `check_one_answer`, ValueError for one of fewer than two classes."""
    model = check_one_answer(model)
    if model.config.num_classes < 2:
        raise ValueError("model has one output, which is a number and no class; allowed: 2 classes or more")
    return model


def check_one_answer(model: nn.Module) -> VideoMamba:
    """Return the model. Raise TypeError unless it is a `VideoMamba`, ValueError unless it gives a clip one number or more."""
    if not isinstance(model, VideoMamba):
        raise TypeError(f"model is a {type(model).__name__}; allowed: a VideoMamba with classes")
    if not model.config.num_classes or model.config.readout == "tokens":
        has = f"num_classes {model.config.num_classes} and readout {model.config.readout!r}"
        raise ValueError(f"model has {has}; allowed: at least one class, and a readout that gives a clip one answer")
    return model
