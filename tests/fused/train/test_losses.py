"""Losses equal their formulas in float64, by the rule; their gradients reach students and not teachers."""

from collections.abc import Callable

import pytest
import torch
from rule import assert_rule, outcome
from torch import Tensor

from fused import DistillOutput, VideoMamba, VideoMambaConfig
from fused.train import (
    alignment_loss,
    contrastive_loss,
    distillation_loss,
    masked_language_loss,
    matching_loss,
    matching_pairs,
    similarity,
)

SEEDS = range(4)
DTYPES = [torch.float32, torch.bfloat16, torch.float64]


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).to(dtype)


def judge(
    loss: Callable[..., Tensor], formula: Callable[..., Tensor], draw: Callable[[int], dict[str, Tensor]], dtype: torch.dtype
) -> None:
    """Assert the rule for `loss` against `formula`: its value, and the gradient of every tensor that `draw(seed)` returns."""
    samples = []
    for seed in SEEDS:
        tensors, ones = draw(seed), [torch.ones((), dtype=torch.float64)]
        plain_in = torch.promote_types(dtype, torch.float32)
        got = outcome(lambda **x: (loss(**x),), tensors, ones, None)
        assert got["out0"].dtype == plain_in and got["out0"].shape == ()
        truth = outcome(lambda **x: (formula(**x),), tensors, ones, torch.float64)
        samples.append((got, truth, outcome(lambda **x: (formula(**x),), tensors, ones, plain_in)))
    assert_rule(samples)


def unit(x: Tensor) -> Tensor:
    return x / x.square().sum(-1, keepdim=True).sqrt()


def entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the cross-entropy of logits (B, C), averaged over rows, for classes (B,) or weights (B, C)."""
    if not targets.is_floating_point():
        targets = (targets[:, None] == torch.arange(logits.shape[1])).double()
    return -(targets.to(logits.dtype) * (logits - logits.exp().sum(-1, keepdim=True).log())).sum(-1).mean()


def squared(student: Tensor, teacher: Tensor) -> Tensor:
    return (unit(student) - unit(teacher)).square().sum(-1).mean()


def smooth(student: Tensor, teacher: Tensor) -> Tensor:
    gap = (student - teacher).abs()
    return torch.where(gap < 1, gap**2 / 2, gap - 0.5).mean()


FORMULAS = {"l2": squared, "mse": lambda s, t: (s - t).square().mean(), "smooth_l1": smooth}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", FORMULAS)
def test_alignment(kind: str, dtype: torch.dtype) -> None:
    teacher = normal(99, 2, 3, 5, 8, dtype=dtype)
    judge(
        lambda student: alignment_loss(student, teacher, kind),
        lambda student: FORMULAS[kind](student, teacher.to(student.dtype)),
        lambda seed: {"student": normal(seed, 2, 3, 5, 8, dtype=dtype, scale=2.0)},
        dtype,
    )


def test_alignment_is_0_for_equal_features_and_gives_the_teacher_no_gradient() -> None:
    student, teacher = normal(0, 2, 3, 8).requires_grad_(), normal(1, 2, 3, 8).requires_grad_()
    for kind in FORMULAS:
        alignment_loss(student, teacher, kind).backward()
    assert teacher.grad is None and student.grad.abs().min() > 0
    same = torch.eye(8)  # unit vectors without rounding
    assert all(alignment_loss(same, same, kind) == 0 for kind in FORMULAS)
    assert alignment_loss(same, 3 * same) == 0 < alignment_loss(same, 3 * same, "mse"), "l2 is of unit vectors"
    assert alignment_loss(same, -same) == 4


def test_layers_have_equal_weight() -> None:
    student, teacher = normal(0, 3, 2, 4, 8).double(), normal(1, 3, 2, 4, 8).double()
    layers = [alignment_loss(s, t).item() for s, t in zip(student, teacher, strict=True)]
    assert alignment_loss(student, teacher).item() == pytest.approx(sum(layers) / 3, rel=8 * torch.finfo(torch.float64).eps)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_distillation(dtype: torch.dtype, soft: bool, smoothing: float) -> None:
    teacher, weights = normal(99, 3, 6, 8, dtype=dtype), normal(98, 3, 5).softmax(1)
    targets = weights if soft else torch.tensor([4, 0, 2])

    def formula(logits: Tensor, features: Tensor) -> Tensor:
        target = (weights if soft else torch.eye(5)[targets]).to(logits.dtype)
        target = (1 - smoothing) * target + smoothing / 5
        return entropy(logits, target) + 0.5 * squared(features, teacher.to(features.dtype))

    judge(
        lambda logits, features: distillation_loss(DistillOutput(logits, features), targets, teacher, 0.5, smoothing),
        formula,
        lambda seed: {"logits": normal(seed, 3, 5, dtype=dtype), "features": normal(seed + 50, 3, 6, 8, dtype=dtype)},
        dtype,
    )


def test_distillation_of_models() -> None:
    toy = {"img_size": 16, "patch_size": 8, "depth": 2, "num_frames": 2, "num_classes": 5, "drop_path_rate": 0.0}
    teacher = VideoMamba(VideoMambaConfig(embed_dim=16, **toy)).eval()
    student = VideoMamba(VideoMambaConfig(embed_dim=32, distill_dim=16, **toy))
    clip = normal(0, 2, 3, 2, 16, 16)
    wanted = teacher.encode(teacher.embed(clip))[0]
    distillation_loss(student(clip), torch.tensor([1, 3]), wanted).backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in student.parameters())
    assert student.distill_head[1].weight.grad.any() and student.head.weight.grad.any()


@pytest.mark.parametrize("frames", [(), (3,)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_contrast(dtype: torch.dtype, frames: tuple[int, ...]) -> None:
    ids = torch.tensor([7, 2, 7, 4])  # the first and the third pair are positives of each other

    def formula(video: Tensor, text: Tensor, temperature: Tensor) -> Tensor:
        products = torch.einsum("b...c,nc->b...n", unit(video), unit(text)) / temperature
        logits = products.mean(1) if frames else products
        targets = torch.tensor([[1.0, 0, 1, 0], [0, 2, 0, 0], [1, 0, 1, 0], [0, 0, 0, 2]]) / 2
        return (entropy(logits, targets) + entropy(logits.T, targets)) / 2

    judge(
        lambda video, text, temperature: contrastive_loss(similarity(video, text, temperature), ids),
        formula,
        lambda seed: {
            "video": normal(seed, 4, *frames, 8, dtype=dtype),
            "text": normal(seed + 50, 4, 8, dtype=dtype),
            "temperature": torch.tensor(0.07, dtype=dtype),
        },
        dtype,
    )


def test_contrast_without_ids_is_with_ids_that_differ() -> None:
    logits = normal(0, 5, 5).double()
    assert torch.equal(contrastive_loss(logits), contrastive_loss(logits, torch.arange(5)))
    assert contrastive_loss(100 * torch.eye(5)) < contrastive_loss(logits) < contrastive_loss(-100 * torch.eye(5))
    assert not torch.equal(contrastive_loss(logits), contrastive_loss(logits, torch.tensor([0, 0, 1, 2, 3])))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_does_not_reach_losses(dtype: torch.dtype) -> None:
    """Every loss has the same bits inside and outside of autocast; a matmul in bfloat16 would have others."""
    video, text, head = normal(0, 6, 8), normal(1, 6, 8), normal(2, 6, 2)
    ids, words = torch.tensor([0, 1, 2, 0, 3, 4]), torch.tensor([1, -100, 3, 0, 2, 7])

    def losses() -> list[Tensor]:
        sims = similarity(video, text)
        aligned = [alignment_loss(video, text, kind) for kind in FORMULAS]
        student = DistillOutput(video, text[:, None])
        other = [distillation_loss(student, ids, video[:, None]), matching_loss(head), masked_language_loss(video, words)]
        return [sims, contrastive_loss(sims, ids), *aligned, *other]

    outside = losses()
    with torch.autocast("cpu", dtype=dtype):
        inside = losses()
    assert all(x.dtype == torch.float32 and torch.equal(x, y) for x, y in zip(inside, outside, strict=True))


def test_matching_pairs() -> None:
    ids = torch.tensor([0, 1, 0, 2])
    logits = normal(0, 4, 4, scale=3.0).requires_grad_()
    seen_texts, seen_videos = torch.zeros(4, 4), torch.zeros(4, 4)
    generator = torch.Generator().manual_seed(1)
    own = torch.arange(4)
    for _ in range(500):
        videos, texts = matching_pairs(logits, ids, generator)
        assert torch.equal(videos[:4], own) and torch.equal(texts[:4], own), "first what matches"
        assert torch.equal(videos[4:8], own) and torch.equal(texts[8:], own)
        seen_texts[own, texts[4:8]] += 1
        seen_videos[own, videos[8:]] += 1
    same = ids[:, None] == ids
    assert not seen_texts[same].any() and not seen_videos[same].any(), "what belongs together is no negative"
    for seen, scores in ((seen_texts, logits.detach()), (seen_videos, logits.detach().T)):
        share = torch.where(same, 0, scores.double().exp())
        share /= share.sum(1, keepdim=True)
        assert ((seen - 500 * share).abs() <= 5 * (500 * share * (1 - share)).sqrt()).all()


def test_matching_pairs_repeat_and_survive_a_sure_pair() -> None:
    sure = 2000 * torch.eye(3)  # softmax leaves exactly 0 for the others
    draws = [matching_pairs(sure, None, torch.Generator().manual_seed(s)) for s in (0, 0, *range(1, 9))]
    assert all(torch.equal(x, y) for x, y in zip(draws[0], draws[1], strict=True))
    assert any(not torch.equal(draws[0].texts, other.texts) for other in draws)
    assert all((d.videos[3:] != d.texts[3:]).all() for d in draws)


@pytest.mark.parametrize("dtype", DTYPES)
def test_matching(dtype: torch.dtype) -> None:
    judge(
        matching_loss,
        lambda logits: entropy(logits, torch.tensor([1, 1, 0, 0, 0, 0])),
        lambda seed: {"logits": normal(seed, 6, 2, dtype=dtype)},
        dtype,
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_masked_language(dtype: torch.dtype) -> None:
    labels = torch.tensor([[3, -100, 0], [-100, -100, 8]])
    kept = labels != -100
    judge(
        lambda logits: masked_language_loss(logits, labels),
        lambda logits: entropy(logits[kept], labels[kept]),
        lambda seed: {"logits": normal(seed, 2, 3, 9, dtype=dtype)},
        dtype,
    )
    logits = normal(0, 2, 3, 9, dtype=dtype).requires_grad_()
    masked_language_loss(logits, labels).backward()
    assert not logits.grad[~kept].any()
    none = masked_language_loss(logits, torch.full((2, 3), -100))
    none.backward()
    assert none == 0 and logits.grad.isfinite().all()


A, B = torch.zeros(2, 3, 4), torch.zeros(2, 3, 5)
STUDENT = DistillOutput(torch.zeros(2, 5), A)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("call", "error", "wanted"),
    [
        (lambda: alignment_loss(A, A, "l1"), ValueError, "kind must be one of 'l2', 'mse', 'smooth_l1', got 'l1'"),
        (lambda: alignment_loss(A, B), ValueError, r"teacher must have a shape .*\(2, 3, 4\) on cpu; got \(2, 3, 5\)"),
        (lambda: alignment_loss(A[:0], A[:0]), ValueError, r"teacher .*not empty"),
        (lambda: alignment_loss(A.long(), A), TypeError, "student must be a floating-point tensor, got torch.int64"),
        (lambda: alignment_loss(A, None), TypeError, "teacher must be a floating-point tensor, got NoneType"),
        (lambda: distillation_loss(STUDENT, torch.zeros(3).long(), A), ValueError, r"targets .*\(B=2,\).*got \(3,\)"),
        (lambda: distillation_loss(STUDENT, torch.zeros(2).long(), B), ValueError, r"teacher .*got \(2, 3, 5\)"),
        (lambda: distillation_loss(STUDENT, torch.zeros(2).long(), A, -1), ValueError, r"weight .*\[0, inf\), got -1"),
        (lambda: distillation_loss(STUDENT, torch.zeros(2).long(), A, 1, 2), ValueError, r"smoothing .*\[0, 1\], got 2"),
        (lambda: similarity(A[0], B[0]), ValueError, r"text must have shape \(N, C=4\), got \(3, 5\)"),
        (lambda: similarity(A[0], A[0], 0.0), ValueError, r"temperature must be a number in \(0, inf\), got 0"),
        (lambda: similarity(A[0], A[0], torch.ones(2)), ValueError, r"temperature must have shape \(\), got \(2,\)"),
        (lambda: contrastive_loss(A[0]), ValueError, r"similarities must have shape \(B=3, B=3\), got \(3, 4\)"),
        (lambda: contrastive_loss(A[0, :0, :0]), ValueError, "similarities must not be empty"),
        (lambda: contrastive_loss(torch.eye(3), torch.zeros(2).long()), ValueError, r"ids .*\(B=3,\).*got torch.int64 \(2,\)"),
        (lambda: contrastive_loss(torch.eye(3), torch.zeros(3)), ValueError, "ids must be integers .*got torch.float32"),
        (lambda: matching_pairs(torch.eye(1)), ValueError, "every pair must have one of another id.*pair 0 has none"),
        (lambda: matching_pairs(torch.eye(2), torch.tensor([4, 4])), ValueError, "every pair must have one of another id"),
        (lambda: matching_loss(torch.zeros(4, 2)), ValueError, "logits must have 3B rows.*got 4"),
        (lambda: matching_loss(torch.zeros(3, 3)), ValueError, r"logits must have shape \(3B, W=2\), got \(3, 3\)"),
        (lambda: masked_language_loss(A, torch.zeros(2, 4).long()), ValueError, r"labels .*\(2, 3\).*got torch.int64 \(2, 4\)"),
        (lambda: masked_language_loss(A, torch.zeros(2, 3)), ValueError, "labels must be int64.*got torch.float32"),
    ],
)
def test_errors(call: Callable[[], object], error: type[Exception], wanted: str) -> None:
    with pytest.raises(error, match=wanted):
        call()
