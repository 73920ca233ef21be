"""Losses of a language model: the next token, and a teacher's most likely tokens."""

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from fused.runtime.checks import check_tensor
from fused.runtime.dtypes import accumulation_dtype

IGNORED = -100  # the label of a token that is not learnt


def next_token_loss(logits: Float[Tensor, "B L V"], labels: Int[Tensor, "B L"]) -> Float[Tensor, ""]:
    """Return the mean cross-entropy, in at least float32, of labelled tokens given the logits one place before.

    Only rows of logits that predict a labelled token are widened to float32.
    """
    targets = labels[:, 1:].flatten()
    learnt = targets != IGNORED
    chosen = logits[:, :-1].flatten(0, 1)[learnt]
    return F.cross_entropy(chosen.to(accumulation_dtype(logits.dtype)), targets[learnt])


def distillation_loss(
    logits: Float[Tensor, "B L V"],
    labels: Int[Tensor, "B L"],
    teacher_logits: Float[Tensor, "B L K"],
    teacher_tokens: Int[Tensor, "B L K"],
    *,
    shift: bool = False,
) -> Float[Tensor, ""]:
    """Return the divergence of the teacher's K most likely tokens from the student's, in at least float32.

    Logits of the K `teacher_tokens` are normalised among themselves, teacher's and student's. KL(teacher || student) is
    averaged over the labelled tokens of each row, then over the rows that have any. As upstream, logits AT labelled tokens are
    compared; with `shift` those one place before, which predict these tokens.

    Raises ValueError or TypeError for shapes and dtypes that do not fit.
    """
    B, L, _ = logits.shape
    check_tensor("distillation_loss", "teacher_logits", teacher_logits, "B L K", {"B": B, "L": L}, logits.device)
    for name, value, due in (("labels", labels, (B, L)), ("teacher_tokens", teacher_tokens, tuple(teacher_logits.shape))):
        if value.is_floating_point() or tuple(value.shape) != due:
            raise ValueError(f"distillation_loss: {name} must be integers {due}, got {value.dtype} {tuple(value.shape)}")
    learnt = labels != IGNORED
    if shift:
        learnt = F.pad(learnt[:, 1:], (0, 1))
    precise = accumulation_dtype(logits.dtype)
    student = logits.gather(2, teacher_tokens).to(precise).log_softmax(-1)
    teacher = teacher_logits.to(precise).log_softmax(-1)
    divergence = F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1).masked_fill(~learnt, 0)
    counts = learnt.sum(1)
    means = divergence.sum(1) / counts.clamp(min=1)
    return means.sum() / (counts > 0).sum().clamp(min=1)
