"""The whole BIMBA of `fused` beside that of the reference: video tokens, logits, loss and gradients, by the one rule."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", reason="the towers are models of transformers")

from bimba_folders import CONFIG  # noqa: E402
from rule import assert_rule  # noqa: E402

import fused  # noqa: E402
import reference  # noqa: E402

IDS = torch.tensor([1, 2, reference.models.bimba.model.VIDEO_TOKEN, 3, 4, 5])
LABELS = torch.tensor([-100, -100, -100, -100, 4, 5])


def pair(seed: int, **config: Any) -> tuple[Any, Any]:
    """Return a model of `fused` and the same of the reference."""
    torch.manual_seed(seed)
    ours = fused.Bimba({**CONFIG, **config}, backend="torch").eval()
    towers = copy.deepcopy((ours.vision_tower, ours.language_model))
    spec = reference.Bimba(*towers, ours.pool, ours.temporal_pooling, ours.newline, ours.compressor_kind).eval()
    spec.load_state_dict(ours.state_dict())
    return ours, spec


def results(model: Any, frames: Tensor | None, precision: torch.dtype) -> dict[str, Tensor]:
    model = model.to(precision)
    ids = IDS if frames is not None else IDS[IDS >= 0]
    labels = LABELS if frames is not None else LABELS[IDS >= 0]
    out = model(ids, None if frames is None else frames.to(precision), labels=labels)
    learnt = {name: p for name, p in model.named_parameters() if name.startswith(("mm_projector", "compressor", "image_new"))}
    grads = torch.autograd.grad(out.loss, list(learnt.values()), allow_unused=True)
    found = {name: torch.zeros(1) if g is None else g for name, g in zip(learnt, grads, strict=True)}
    return {"logits": out.logits.detach(), "loss": out.loss.detach()[None]} | found


@pytest.mark.parametrize(
    "config",
    [
        {}, {"mm_newline_position": "frame"}, {"mm_newline_position": "no_token", "mm_spatial_pool_mode": "max"},
        {"temporal_pooling": 2, "mm_spatial_pool_mode": "average"}, {"compressor_type": "attention"},
    ],
    ids=str,
)  # fmt: skip
def test_a_model_with_a_video_is_the_references(config: dict[str, Any]) -> None:
    def found(seed: int) -> tuple[dict[str, Tensor], ...]:
        ours, spec = pair(seed, **config)
        frames = torch.rand(3, 3, 70, 70) * 2 - 1
        truth = copy.deepcopy(spec)
        return tuple(results(*given) for given in (
            (ours, frames, torch.float32), (truth, frames, torch.float64), (spec, frames, torch.float32)
        ))  # fmt: skip

    assert_rule(found(seed) for seed in range(4))


def test_without_a_video_text_alone_is_read() -> None:
    ours, spec = pair(0)
    due = results(spec, None, torch.float32)
    assert all(torch.equal(x, due[name]) for name, x in results(ours, None, torch.float32).items())


def test_what_does_not_fit_is_said() -> None:
    _, spec = pair(0)
    with pytest.raises(ValueError, match="hold 1 video tokens .*; allowed is one for frames, else none"):
        spec(IDS)
    with pytest.raises(ValueError, match="hold 0 video tokens"):
        spec(IDS[:2], torch.zeros(1, 3, 70, 70))
    with pytest.raises(ValueError, match="newline is 'row'; allowed are"):
        reference.Bimba(spec.vision_tower, spec.language_model, newline="row")
    with pytest.raises(ValueError, match="pool is 'cubic'"):
        reference.Bimba(spec.vision_tower, spec.language_model, pool="cubic").compress(torch.zeros(1, 5, 5, 32))
