"""Targets of a mixed batch are in the proportion of its pixels."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fused.train import Mixed, cutmix, mix, mixup

CLASSES = torch.tensor([3, 0, 2])


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def flat_clips(*frames: int) -> Tensor:
    """Return clips of which clip i is 2^i everywhere, so that a mixed pixel tells its proportions."""
    return (2.0 ** torch.arange(3)).view(3, *[1] * (3 + len(frames))).expand(3, 2, *frames, 9, 12).double()


def shares(clips: Tensor) -> Tensor:
    """Return the proportion (B,) of each clip itself, from the mean of its pixels."""
    own, other = 2.0 ** torch.arange(3), (2.0 ** torch.arange(3)).roll(1)
    return (clips.flatten(1).mean(1) - other) / (own - other)


@pytest.mark.parametrize("how", [mixup, cutmix])
@pytest.mark.parametrize("frames", [(), (4,)])
@pytest.mark.parametrize("soft", [False, True])
def test_classes_have_the_share_of_pixels(how: Callable[..., Mixed], frames: tuple[int, ...], soft: bool) -> None:
    seen = set()
    weights = torch.rand(3, 5, generator=seeded(0), dtype=torch.float64)
    weights = weights / weights.sum(1, keepdim=True)
    for seed in range(30):
        clips, targets = how(flat_clips(*frames), weights if soft else CLASSES, 5, 1.0, seeded(seed))
        assert clips.shape == flat_clips(*frames).shape and clips.dtype == torch.float64
        assert targets.dtype == (torch.float64 if soft else torch.float32)
        share = shares(clips)
        one = weights if soft else F.one_hot(CLASSES, 5).double()
        wanted = share[:, None] * one + (1 - share[:, None]) * one.roll(1, 0)
        room = 8 * torch.finfo(targets.dtype).eps
        assert (targets - wanted).abs().max() <= room and (targets.sum(1) - 1).abs().max() <= room
        seen.add(round(share[0].item(), 6))
    assert len(seen) > 10 and min(seen) < 0.3 < 0.7 < max(seen)


def test_a_box_has_the_share_that_lambda_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the area, not of a side."""
    monkeypatch.setattr("fused.train.data.mixup.sample_beta", lambda alpha, generator: 0.75)
    clips = torch.stack([torch.zeros(1, 100, 100), torch.ones(1, 100, 100)])
    areas = [cutmix(clips, torch.tensor([0, 1]), 2, 1.0, seeded(seed)).clips[0].mean() for seed in range(60)]
    assert max(areas) == 0.25, "where the border does not clip it"


@pytest.mark.parametrize(("switch", "name", "alpha"), [(1.0, "cutmix", 0.7), (0.0, "mixup", 0.3)])
def test_each_way_of_mixing_has_its_own_alpha(switch: float, name: str, alpha: float, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []
    monkeypatch.setattr("fused.train.data.mixup.sample_beta", lambda alpha, generator: seen.append(alpha) or 0.5)
    mix(flat_clips(), CLASSES, 5, mixup_alpha=0.3, cutmix_alpha=0.7, switch=switch, generator=seeded(0))
    assert seen == [alpha], name


def test_mixup_mixes_every_pixel_alike() -> None:
    clips = torch.randn(3, 2, 4, 9, 12, generator=seeded(1), dtype=torch.float64)
    mixed, targets = mixup(clips, CLASSES, 5, generator=seeded(2))
    share = targets[0, 3].double()
    wanted = share * clips + (1 - share) * clips.roll(1, 0)
    assert (mixed - wanted).abs().max() <= 8 * torch.finfo(torch.float32).eps * clips.abs().max()


def test_cutmix_moves_one_box_through_all_frames() -> None:
    clips = torch.randn(3, 2, 4, 9, 12, generator=seeded(3))
    tops, cut = set(), {"top": 0, "bottom": 0, "left": 0, "right": 0}
    for seed in range(40):
        mixed, _ = cutmix(clips, CLASSES, 5, generator=seeded(seed))
        foreign = mixed != clips
        assert torch.equal(torch.where(foreign, clips.roll(1, 0), clips), mixed)
        box = foreign[0, 0, 0]
        assert (foreign == box).all()
        rows, columns = box.any(1).nonzero().flatten().tolist(), box.any(0).nonzero().flatten().tolist()
        assert int(box.sum()) == len(rows) * len(columns)
        if rows:
            assert rows == list(range(rows[0], rows[-1] + 1)) and columns == list(range(columns[0], columns[-1] + 1))
            tops.add((rows[0], columns[0]))
            # a whole box has even sides
            odd_rows, odd_columns = len(rows) % 2, len(columns) % 2
            cut["top"] += odd_rows and rows[0] == 0 and rows[-1] < 8
            cut["bottom"] += odd_rows and rows[0] > 0
            cut["left"] += odd_columns and columns[0] == 0 and columns[-1] < 11
            cut["right"] += odd_columns and columns[0] > 0
    assert len(tops) > 10 and all(cut.values()), f"anywhere, cut at every border: {cut}"


def test_the_beta_distribution() -> None:
    """Proportions have the variance of Beta(a, a), 1 / (4 (2a + 1))."""
    for alpha in (0.2, 1.0, 20.0):
        generator = seeded(4)
        drawn = torch.stack([mixup(flat_clips(), CLASSES, 5, alpha, generator).targets[0, 3] for _ in range(500)]).double()
        variance = 1 / (4 * (2 * alpha + 1))
        assert abs(drawn.mean() - 0.5) <= 5 * (variance / 500) ** 0.5
        spread = (drawn - 0.5).square()
        assert abs(spread.mean() - variance) <= 5 * (spread.var() / 500) ** 0.5


def kind_of(clips: Tensor) -> str:
    if torch.equal(clips, flat_clips(4)):
        return "none"
    return "cutmix" if torch.isin(clips, 2.0 ** torch.arange(3)).all() else "mixup"


def test_mix_chooses() -> None:
    def found(seeds: int = 60, **how: Any) -> list[str]:
        return [kind_of(mix(flat_clips(4), CLASSES, 5, generator=seeded(s), **how).clips) for s in range(seeds)]

    both = found(400)
    assert abs(both.count("mixup") - 200) <= 5 * 10 and abs(both.count("cutmix") + both.count("none") - 200) <= 5 * 10
    assert "mixup" not in found(switch=1.0) and set(found(switch=0.0)) == {"mixup"}
    assert set(found(cutmix_alpha=0.0)) == {"mixup"} and "mixup" not in found(mixup_alpha=0.0)
    assert set(found(probability=0.0)) == set(found(mixup_alpha=0.0, cutmix_alpha=0.0)) == {"none"}
    assert abs(found(400, probability=0.25, cutmix_alpha=0.0).count("mixup") - 100) <= 5 * 75**0.5
    untouched = mix(flat_clips(4), CLASSES, 5, probability=0.0)
    assert torch.equal(untouched.targets, F.one_hot(CLASSES, 5).float())


def test_seeds_repeat_and_inputs_stay() -> None:
    for how in (mixup, cutmix, partial(mix, switch=0.0), partial(mix, switch=1.0)):
        clips = flat_clips(4).clone()
        one, again, other = (how(clips, CLASSES, 5, generator=seeded(s)) for s in (0, 0, 1))
        assert all(torch.equal(x, y) for x, y in zip(one, again, strict=True)) and not torch.equal(one.clips, other.clips)
        assert torch.equal(clips, flat_clips(4))
        with torch.random.fork_rng():
            torch.manual_seed(0)
            assert torch.equal(how(clips, CLASSES, 5).clips, one.clips), "without a generator PyTorch's own"


def test_smoothing_before_mixing_equals_smoothing_after() -> None:
    """F.cross_entropy's label_smoothing on mixed weights equals upstream's mixture of smoothed classes."""
    logits, s = torch.randn(3, 5, generator=seeded(5), dtype=torch.float64), 0.1
    clips = flat_clips(4)
    behind = F.cross_entropy(
        logits, mixup(clips, torch.eye(5).double()[CLASSES], 5, generator=seeded(6)).targets, label_smoothing=s
    )
    smoothed = (1 - s) * torch.eye(5).double()[CLASSES] + s / 5
    before = F.cross_entropy(logits, mixup(clips, smoothed, 5, generator=seeded(6)).targets)
    assert abs(before - behind) <= 8 * torch.finfo(torch.float64).eps * before


CLIPS = torch.zeros(2, 3, 4, 8, 8)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("how", [mixup, cutmix, mix])
@pytest.mark.parametrize(
    ("clips", "targets", "classes", "wanted"),
    [
        (CLIPS[:1], torch.tensor([0]), 5, r"clips must be .*B at least 2, got torch.float32 \(1, 3, 4, 8, 8\)"),
        (CLIPS.byte(), torch.tensor([0, 1]), 5, "clips must be floating point .*got torch.uint8"),
        (CLIPS[0, 0], torch.tensor([0, 1]), 5, r"clips must be .*got torch.float32 \(4, 8, 8\)"),
        (CLIPS, torch.tensor([0, 1, 2]), 5, r"targets must be int64 classes \(B=2,\).*got torch.int64 \(3,\)"),
        (CLIPS, torch.tensor([0, 1]).int(), 5, "targets must be int64 classes .*got torch.int32"),
        (CLIPS, torch.zeros(2, 4), 5, r"classes=5\), got torch.float32 \(2, 4\)"),
        (CLIPS, torch.tensor([0, 1]), 0, "classes must be an integer from 1 up, got 0"),
    ],
)
def test_errors(how: Callable[..., Mixed], clips: Tensor, targets: Tensor, classes: int, wanted: str) -> None:
    with pytest.raises(ValueError, match=wanted):
        how(clips, targets, classes)


@pytest.mark.usefixtures("unchecked")
def test_errors_of_numbers() -> None:
    for how in (mixup, cutmix):
        with pytest.raises(ValueError, match=r"alpha must be a number in \(0, inf\), got 0"):
            how(CLIPS, torch.tensor([0, 1]), 5, 0)
    for name in ("probability", "switch"):
        with pytest.raises(ValueError, match=rf"{name} must be a number in \[0, 1\], got 1.5"):
            mix(CLIPS, torch.tensor([0, 1]), 5, **{name: 1.5})
    with pytest.raises(TypeError, match=r"mixup_alpha must be a number in \[0, inf\), got NoneType"):
        mix(CLIPS, torch.tensor([0, 1]), 5, None)
    with pytest.raises(ValueError, match="targets must be classes 0 to 4, got -1 to 1"):
        mix(CLIPS, torch.tensor([-1, 1]), 5)
