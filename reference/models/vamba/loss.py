"""Losses of a language model: next token, and a teacher's most likely tokens."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from reference.ops.dtypes import accumulation_dtype

IGNORED = -100  # the label of a token that is not learnt


def next_token_loss(logits: Float[Tensor, "B L V"], labels: Int[Tensor, "B L"]) -> Float[Tensor, ""]:
    """Return the mean cross-entropy, in at least float32, of every labelled token given the logits one place before it."""
    precise = logits[:, :-1].to(accumulation_dtype(logits.dtype))
    return F.cross_entropy(precise.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)


def distillation_loss(
    logits: Float[Tensor, "B L V"],
    labels: Int[Tensor, "B L"],
    teacher_logits: Float[Tensor, "B L K"],
    teacher_tokens: Int[Tensor, "B L K"],
    *,
    shift: bool = False,
) -> Float[Tensor, ""]:
    """Return the divergence of the teacher's K most likely tokens from the student's, in at least float32.

    At every labelled token, teacher's and student's logits of the K `teacher_tokens` are normalised among themselves, and
    KL(teacher || student) is averaged over the tokens of a row, then over the rows that have any. Upstream compares the logits
    AT the labelled tokens. With `shift` it is those one place before, which predict them, of both.
    """
    precise = accumulation_dtype(logits.dtype)
    learnt = labels != IGNORED
    if shift:
        learnt = torch.cat((learnt[:, 1:], torch.zeros_like(learnt[:, :1])), dim=1)
    student = logits.to(precise).gather(2, teacher_tokens).log_softmax(-1)
    teacher = teacher_logits.to(precise).log_softmax(-1)
    divergence = (teacher.exp() * (teacher - student)).sum(-1)
    means = [row[kept].mean() for row, kept in zip(divergence, learnt, strict=True) if bool(kept.any())]
    return torch.stack(means).mean() if means else divergence.sum() * 0
