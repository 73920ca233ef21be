"""What training minimises. Every loss is a scalar in at least float32, also under autocast; teachers get no gradient.

Labels are smoothed by PyTorch: `F.cross_entropy(logits, targets, label_smoothing=0.1)`, whose targets may be classes (B,) or
the weights (B, classes) of `fused.train.data.mixup`; smoothing before mixing and after is the same.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fused.models.videomamba.model import DistillOutput
from fused.rules import check_number
from fused.runtime.autocast import no_autocast
from fused.runtime.checks import check_choice, check_tensor
from fused.runtime.dtypes import accumulation_dtype
from fused.train.random import gumbel

ALIGNMENTS = ("l2", "mse", "smooth_l1")
IGNORED = -100  # the label of a word that is not predicted, F.cross_entropy's own


def alignment_loss(
    student: Float[Tensor, "*tokens C"], teacher: Float[Tensor, "*tokens C"], kind: str = "l2"
) -> Float[Tensor, ""]:
    """A student's features against a frozen teacher's, averaged over all: UMT's masked feature alignment (arXiv 2303.16058).

        l2         2 - 2 cos(student, teacher), the squared distance of unit vectors; what VideoMamba trains with
        mse        (student - teacher)^2
        smooth_l1  d^2 / 2 where |d| < 1, else |d| - 1/2; d = student - teacher

    Both have the same shape, `EncoderOutput.clip`'s (K, B, V, C) for K layers, each layer counting as much, or any other
    (..., C); any floating-point dtypes. "mse" and "smooth_l1" take lengths as they come: for unit vectors use
    clip_norm_type="l2" and a teacher of unit length.

    Raises ValueError or TypeError for shapes that differ, other dtypes and an unknown kind.
    """
    check_choice("alignment_loss", "kind", kind, ALIGNMENTS)
    _check_float("alignment_loss", "student", student)
    _check_like("alignment_loss", "teacher", teacher, student)
    with no_autocast(student.device):
        student, teacher = _precise(student), _precise(teacher.detach())
        if kind == "mse":
            return F.mse_loss(student, teacher)
        if kind == "smooth_l1":
            return F.smooth_l1_loss(student, teacher)
        return (2 - 2 * F.cosine_similarity(student, teacher, dim=-1)).mean()


def distillation_loss(
    student: DistillOutput,
    targets: Int[Tensor, " B"] | Float[Tensor, "B classes"],
    teacher: Float[Tensor, "B L C"],
    weight: int | float = 1.0,
    label_smoothing: int | float = 0.0,
) -> Float[Tensor, ""]:
    """VideoMamba's self-distillation (arXiv 2403.06977): cross-entropy + weight * mean over tokens of 2 - 2 cos.

    `student` is the output of a `VideoMamba` with distill_dim = C: logits (B, classes), features (B, L, C). `teacher` holds a
    smaller model's final-normed tokens of the same clips, CLS included, of any length:
    `teacher.encode(teacher.embed(clip))[0]` under `torch.no_grad()`. `targets` are classes or their weights.

    Raises ValueError or TypeError for shapes that differ, other dtypes, a negative weight, a smoothing outside [0, 1].
    """
    check_number("distillation_loss", "weight", weight, 0, float("inf"), "[)")
    check_number("distillation_loss", "label_smoothing", label_smoothing, 0, 1)
    check_tensor("distillation_loss", "student.logits", student.logits, "B classes", {}, None)
    _check_float("distillation_loss", "student.features", student.features)
    _check_like("distillation_loss", "teacher", teacher, student.features)
    clips, classes = student.logits.shape
    if tuple(targets.shape) not in ((clips,), (clips, classes)):
        wanted = f"(B={clips},), or weights (B={clips}, classes={classes})"
        raise ValueError(f"distillation_loss: targets must be classes {wanted}, got {tuple(targets.shape)}")
    with no_autocast(student.logits.device):
        logits = _precise(student.logits)
        if targets.is_floating_point():
            targets = targets.to(logits.dtype)
        right = F.cross_entropy(logits, targets, label_smoothing=label_smoothing)
    return right + weight * alignment_loss(student.features, teacher)


def similarity(
    video: Float[Tensor, "B C"] | Float[Tensor, "B T C"], text: Float[Tensor, "N C"], temperature: int | float | Tensor = 0.07
) -> Float[Tensor, "B N"]:
    """Cosines of videos and texts over the temperature; of a video with T features, the mean of their cosines.

    Upstream's temperature is a parameter () that starts at 0.07 and is kept in [0.001, 0.5]: after each step
    `temperature.data.clamp_(0.001, 0.5)`. Any floating-point dtypes; the result is in at least float32. Gradients reach all
    three. In distributed training pass what was gathered. Raises ValueError or TypeError for what does not fit.
    """
    check_tensor("similarity", "video", video, "B C | B T C", {}, None)
    check_tensor("similarity", "text", text, "N C", {"C": video.shape[-1]}, video.device)
    if isinstance(temperature, Tensor):
        check_tensor("similarity", "temperature", temperature, "", {}, None)
    else:
        check_number("similarity", "temperature", temperature, 0, float("inf"), "()")
    with no_autocast(video.device):
        video, text = F.normalize(_precise(video), dim=-1), F.normalize(_precise(text), dim=-1)
        if video.dim() == 3:
            video = video.mean(dim=1)  # the mean of the cosines is the cosine's numerator with the mean
        dtype = torch.promote_types(video.dtype, text.dtype)
        return video.to(dtype) @ text.to(dtype).T / temperature


def contrastive_loss(similarities: Float[Tensor, "B B"], ids: Int[Tensor, " B"] | None = None) -> Float[Tensor, ""]:
    """Video-text contrast (InfoNCE, arXiv 1807.03748): cross-entropy of every video over the texts, and of every text over
    the videos, averaged.

    `similarities` is what `similarity` gives for pairs in order. `ids` tells what a pair is of: all with one id belong
    together and share the target in equal parts; None: every pair by itself. Raises ValueError or TypeError for what does
    not fit.
    """
    same = _together("contrastive_loss", similarities, ids)
    with no_autocast(similarities.device):
        logits = _precise(similarities)
        targets = same.to(logits.dtype) / same.sum(dim=1, keepdim=True)  # symmetric, but for the row by which it is scaled
        return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2


class MatchingPairs(NamedTuple):
    """Pairs for video-text matching: B that match, B videos with a text that does not, B texts with a video that does not."""

    videos: Tensor  # (3B,) integer
    texts: Tensor  # (3B,) integer


def matching_pairs(
    similarities: Float[Tensor, "B B"], ids: Int[Tensor, " B"] | None = None, generator: torch.Generator | None = None
) -> MatchingPairs:
    """Which video goes with which text into the head of video-text matching: `video[pairs.videos]`, `text[pairs.texts]`.

    Negatives are hard (arXiv 2107.07651): a video's is drawn by softmax of its similarities with the texts of other ids, a
    text's likewise; no gradient. Arguments as of `contrastive_loss`; `generator`: see `fused.train.random`.

    Raises ValueError or TypeError for what does not fit, and where an item has no negative.
    """
    same = _together("matching_pairs", similarities, ids)
    if bool(same.all(dim=1).any()):
        raise ValueError("matching_pairs: every pair needs one of another id in the batch, got one that has none")
    # what belongs together is left out before the softmax: behind it a sure pair would leave the others 0
    logits = _precise(similarities.detach()).masked_fill(same, -torch.inf)
    texts, videos = ((x + gumbel(tuple(x.shape), generator, x.device)).argmax(dim=1) for x in (logits, logits.T))
    own = torch.arange(len(same), device=same.device)
    return MatchingPairs(torch.cat((own, own, videos)), torch.cat((own, texts, own)))


def matching_loss(logits: Float[Tensor, "pairs 2"]) -> Float[Tensor, ""]:
    """Cross-entropy of the two-way head over `matching_pairs`: the first third matches (class 1), the rest does not (0).

    Any floating-point dtype. Raises ValueError or TypeError for another shape or dtype.
    """
    check_tensor("matching_loss", "logits", logits, "3B W", {"W": 2}, None)
    if not len(logits) or len(logits) % 3:
        raise ValueError(f"matching_loss: logits must have 3B rows, those of matching_pairs, got {len(logits)}")
    labels = (torch.arange(len(logits), device=logits.device) < len(logits) // 3).long()
    with no_autocast(logits.device):
        return F.cross_entropy(_precise(logits), labels)


def masked_language_loss(logits: Float[Tensor, "*words V"], labels: Int[Tensor, "*words"]) -> Float[Tensor, ""]:
    """Cross-entropy over the vocabulary (V) of the words to be predicted; the others have the label -100. 0 if there are none.

    Any floating-point dtype; labels int64, those of `mask_words`. Raises ValueError or TypeError for what does not fit.
    """
    _check_float("masked_language_loss", "logits", logits)
    if labels.dtype != torch.int64 or labels.shape != logits.shape[:-1]:
        wanted = f"int64 of shape {tuple(logits.shape[:-1])}, one for each word of logits"
        raise ValueError(f"masked_language_loss: labels must be {wanted}, got {labels.dtype} {tuple(labels.shape)}")
    with no_autocast(logits.device):
        rows = _precise(logits).flatten(0, -2)
        total = F.cross_entropy(rows, labels.flatten(), ignore_index=IGNORED, reduction="sum")
    return total / (labels != IGNORED).sum().clamp(min=1)


def _together(op: str, similarities: Tensor, ids: Tensor | None) -> Bool[Tensor, "B B"]:
    """Which of the pairs belong together."""
    size = len(similarities) if similarities.dim() else 0
    check_tensor(op, "similarities", similarities, "B B", {"B": size}, None)
    if not size:
        raise ValueError(f"{op}: similarities must not be empty, got shape {tuple(similarities.shape)}")
    if ids is None:
        return torch.eye(size, dtype=torch.bool, device=similarities.device)
    if ids.is_floating_point() or tuple(ids.shape) != (size,):
        raise ValueError(f"{op}: ids must be integers of shape (B={size},), or None, got {ids.dtype} {tuple(ids.shape)}")
    ids = ids.to(similarities.device)
    return ids[:, None] == ids


def _check_float(op: str, name: str, value: object) -> None:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        came = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{op}: {name} must be a floating-point tensor, got {came}")


def _check_like(op: str, name: str, value: Tensor, model: Tensor) -> None:
    _check_float(op, name, value)
    if value.shape != model.shape or value.device != model.device or not value.numel():
        wanted = f"the student's, not empty: {tuple(model.shape)} on {model.device}"
        raise ValueError(f"{op}: {name} must have a shape and device like {wanted}; got {tuple(value.shape)} on {value.device}")


def _precise(x: Tensor) -> Tensor:
    return x.to(accumulation_dtype(x.dtype))
