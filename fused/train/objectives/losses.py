"""Losses of training. Every loss is a scalar in at least float32, also under autocast; teachers get no gradient.

Labels are smoothed by PyTorch: `F.cross_entropy(logits, targets, label_smoothing=0.1)`, whose targets are classes (B,) or the
weights (B, classes) of `fused.train.data.mixup`. Smoothing before mixing and after it is the same.
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
from fused.train.random import gumbel_noise

ALIGNMENTS = ("l2", "mse", "smooth_l1")
IGNORE_INDEX = -100  # the label of a word that is not predicted; F.cross_entropy's default


def alignment_loss(
    student: Float[Tensor, "*tokens C"], teacher: Float[Tensor, "*tokens C"], kind: str = "l2"
) -> Float[Tensor, ""]:
    """Return the mean distance of a student's features from a frozen teacher's: UMT's feature alignment (arXiv 2303.16058).

        l2         2 - 2 cos(student, teacher), the squared distance of unit vectors; VideoMamba trains with this one
        mse        (student - teacher)^2
        smooth_l1  d^2 / 2 where |d| < 1, else |d| - 1/2; d = student - teacher

    Both tensors have the same shape: `EncoderOutput.clip`'s (K, B, V, C) for K layers of equal weight, or any other (..., C),
    in any floating-point dtypes. "mse" and "smooth_l1" do not normalise: for unit vectors use clip_norm_type="l2" and a
    teacher of unit length.

    Raises ValueError or TypeError for shapes that differ, other dtypes and an unknown kind.
    """
    check_choice("alignment_loss", "kind", kind, ALIGNMENTS)
    _check_float("alignment_loss", "student", student)
    _check_same_shape("alignment_loss", "teacher", teacher, student)
    with no_autocast(student.device):
        student, teacher = _upcast(student), _upcast(teacher.detach())
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
    """Return VideoMamba's self-distillation loss (arXiv 2403.06977): cross-entropy + weight * mean over tokens of 2 - 2 cos.

    `student` is the output of a `VideoMamba` with distill_dim = C: logits (B, classes), features (B, L, C). `teacher` holds a
    smaller model's tokens of the same clips after its final norm, CLS included, of any length:
    `teacher.encode(teacher.embed(clip))[0]` under `torch.no_grad()`. `targets` are classes or their weights.

    Raises ValueError or TypeError for shapes that differ, other dtypes, a negative weight, a smoothing outside [0, 1].
    """
    check_number("distillation_loss", "weight", weight, 0, float("inf"), "[)")
    check_number("distillation_loss", "label_smoothing", label_smoothing, 0, 1)
    check_tensor("distillation_loss", "student.logits", student.logits, "B classes", {}, None)
    _check_float("distillation_loss", "student.features", student.features)
    _check_same_shape("distillation_loss", "teacher", teacher, student.features)
    clips, classes = student.logits.shape
    if tuple(targets.shape) not in ((clips,), (clips, classes)):
        expected = f"(B={clips},), or weights (B={clips}, classes={classes})"
        raise ValueError(f"distillation_loss: targets must be classes {expected}, got {tuple(targets.shape)}")
    with no_autocast(student.logits.device):
        logits = _upcast(student.logits)
        if targets.is_floating_point():
            targets = targets.to(logits.dtype)
        cross_entropy = F.cross_entropy(logits, targets, label_smoothing=label_smoothing)
    return cross_entropy + weight * alignment_loss(student.features, teacher)


def similarity(
    video: Float[Tensor, "B C"] | Float[Tensor, "B T C"], text: Float[Tensor, "N C"], temperature: int | float | Tensor = 0.07
) -> Float[Tensor, "B N"]:
    """Return cosines of videos and texts over the temperature; for a video with T features, the mean of their cosines.

    Upstream's temperature is a parameter () that starts at 0.07 and is kept in [0.001, 0.5]: after each step
    `temperature.data.clamp_(0.001, 0.5)`. Inputs have any floating-point dtype; the result is in at least float32. Gradients
    reach all three. In distributed training pass features gathered from all ranks. Raises ValueError or TypeError for
    arguments that do not fit.
    """
    check_tensor("similarity", "video", video, "B C | B T C", {}, None)
    check_tensor("similarity", "text", text, "N C", {"C": video.shape[-1]}, video.device)
    if isinstance(temperature, Tensor):
        check_tensor("similarity", "temperature", temperature, "", {}, None)
    else:
        check_number("similarity", "temperature", temperature, 0, float("inf"), "()")
    with no_autocast(video.device):
        video, text = F.normalize(_upcast(video), dim=-1), F.normalize(_upcast(text), dim=-1)
        if video.dim() == 3:
            video = video.mean(dim=1)  # the product with the mean of unit vectors is the mean of the cosines
        dtype = torch.promote_types(video.dtype, text.dtype)
        return video.to(dtype) @ text.to(dtype).T / temperature


def contrastive_loss(similarities: Float[Tensor, "B B"], ids: Int[Tensor, " B"] | None = None) -> Float[Tensor, ""]:
    """Return the video-text contrastive loss (InfoNCE, arXiv 1807.03748).

    It is the mean of two cross-entropies: of every video over the texts, and of every text over the videos. `similarities`
    is the output of `similarity` for pairs in order. Pairs with equal `ids` are positives of each other and share the target
    equally; None: every pair has an id of its own. Raises ValueError or TypeError for arguments that do not fit.
    """
    positives = _positives("contrastive_loss", similarities, ids)
    with no_autocast(similarities.device):
        logits = _upcast(similarities)
        # positives of each other have equal row sums, so the matrix is symmetric and serves both cross-entropies
        targets = positives.to(logits.dtype) / positives.sum(dim=1, keepdim=True)
        return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2


class MatchingPairs(NamedTuple):
    """Pairs for video-text matching: B positives, B videos with a negative text, B texts with a negative video."""

    videos: Tensor  # (3B,) integer
    texts: Tensor  # (3B,) integer


def matching_pairs(
    similarities: Float[Tensor, "B B"], ids: Int[Tensor, " B"] | None = None, generator: torch.Generator | None = None
) -> MatchingPairs:
    """Return the pairs for the head of video-text matching: `video[pairs.videos]` and `text[pairs.texts]`.

    Negatives are hard (arXiv 2107.07651): a video's is drawn by the softmax of its similarities with the texts of other ids,
    and a text's likewise; without gradient. Arguments as of `contrastive_loss`; `generator`: see `fused.train.random`.

    Raises ValueError or TypeError for arguments that do not fit, and where an item has no negative.
    """
    positives = _positives("matching_pairs", similarities, ids)
    if len(alone := positives.all(dim=1).nonzero()):
        raise ValueError(f"matching_pairs: every pair must have one of another id in the batch, pair {int(alone[0])} has none")
    # positives are masked before the softmax: after it, a positive of probability 1 would leave the negatives 0
    logits = _upcast(similarities.detach()).masked_fill(positives, -torch.inf)
    texts, videos = ((x + gumbel_noise(tuple(x.shape), generator, x.device)).argmax(dim=1) for x in (logits, logits.T))
    indices = torch.arange(len(positives), device=positives.device)
    return MatchingPairs(torch.cat((indices, indices, videos)), torch.cat((indices, texts, indices)))


def matching_loss(logits: Float[Tensor, "pairs 2"]) -> Float[Tensor, ""]:
    """Return the cross-entropy of the two-way head over `matching_pairs`: class 1 for the first third, 0 for the rest.

    Any floating-point dtype. Raises ValueError or TypeError for another shape or dtype.
    """
    check_tensor("matching_loss", "logits", logits, "3B W", {"W": 2}, None)
    if not len(logits) or len(logits) % 3:
        raise ValueError(f"matching_loss: logits must have 3B rows, those of matching_pairs, got {len(logits)}")
    labels = (torch.arange(len(logits), device=logits.device) < len(logits) // 3).long()
    with no_autocast(logits.device):
        return F.cross_entropy(_upcast(logits), labels)


def masked_language_loss(logits: Float[Tensor, "*words V"], labels: Int[Tensor, "*words"]) -> Float[Tensor, ""]:
    """Return the cross-entropy over the vocabulary (V), averaged over the words whose label is not -100; 0 if there are none.

    Logits have any floating-point dtype; labels are int64, those of `mask_words`. Raises ValueError or TypeError for
    arguments that do not fit.
    """
    _check_float("masked_language_loss", "logits", logits)
    if labels.dtype != torch.int64 or labels.shape != logits.shape[:-1]:
        expected = f"int64 of shape {tuple(logits.shape[:-1])}, one for each word of logits"
        raise ValueError(f"masked_language_loss: labels must be {expected}, got {labels.dtype} {tuple(labels.shape)}")
    with no_autocast(logits.device):
        rows = _upcast(logits).flatten(0, -2)
        total = F.cross_entropy(rows, labels.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")
    return total / (labels != IGNORE_INDEX).sum().clamp(min=1)


def _positives(op: str, similarities: Tensor, ids: Tensor | None) -> Bool[Tensor, "B B"]:
    """Return which pairs have equal ids, bool (B, B). Raise TypeError or ValueError for arguments that do not fit."""
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
    """Raise TypeError unless `value` is a floating-point tensor."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        found = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{op}: {name} must be a floating-point tensor, got {found}")


def _check_same_shape(op: str, name: str, value: Tensor, student: Tensor) -> None:
    """Raise TypeError unless `value` is floating point, ValueError unless it has the student's shape and device."""
    _check_float(op, name, value)
    if value.shape != student.shape or value.device != student.device or not value.numel():
        expected = f"the student's, not empty: {tuple(student.shape)} on {student.device}"
        raise ValueError(
            f"{op}: {name} must have a shape and device like {expected}; got {tuple(value.shape)} on {value.device}"
        )


def _upcast(x: Tensor) -> Tensor:
    """Return the tensor in at least float32."""
    return x.to(accumulation_dtype(x.dtype))
