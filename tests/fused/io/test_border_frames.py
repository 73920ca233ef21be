"""Frames and pixels by the rules of upstream's video-text models (video_mm)."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from fused.io.picture import MEAN, STD
from fused.io.preprocessing import Preprocessing
from fused.io.sampling import border_frames
from fused.io.video import VideoError, VideoTooShort
from fused.io.views import Views

FILE = Path("some.mp4")


def numbers(total: int, fps: float = 25.0, seed: int | None = None, **fields: object) -> list[int]:
    rule = Preprocessing(8, 32, **{"sampling": "borders", "short": "last", **fields})  # type: ignore[arg-type]
    times = [i / fps for i in range(total)]
    return rule.frame_numbers(FILE, total, times, None if seed is None else random.Random(seed))


def test_the_middle_of_every_stretch() -> None:
    assert numbers(100) == [5, 18, 30, 43, 55, 68, 80, 93]
    assert numbers(8) == list(range(8)) and numbers(3) == [0, 1, 2, 2, 2, 2, 2, 2]
    for total in range(1, 260):
        edges = np.linspace(0, total, min(8, total) + 1).astype(int)
        due = [(a + b - 1) // 2 for a, b in zip(edges[:-1], edges[1:], strict=True)]
        assert numbers(total) == due + [due[-1]] * (8 - len(due))


def test_random_frames_leave_out_the_last_of_a_stretch() -> None:
    drawn = {tuple(numbers(24, seed=seed)) for seed in range(400)}
    assert {frame for clip in drawn for frame in clip} == {3 * i + j for i in range(8) for j in (0, 1)}
    few = {tuple(numbers(9, seed=seed)) for seed in range(400)}  # a stretch has one frame: any eight of nine, in order
    assert few == {tuple(i for i in range(9) if i != left) for left in range(9)}
    assert border_frames(2, 4, random.Random(0)) == [0, 1, 1, 1]


@pytest.mark.parametrize(("total", "fps", "kept"), [(1500, 25.0, 750), (1000, 29.97, 899), (749, 25.0, 749), (750, 25.0, 750)])
def test_the_first_thirty_seconds(total: int, fps: float, kept: int) -> None:
    assert numbers(total, fps, first_seconds=30) == numbers(kept, fps)
    assert numbers(total, fps, first_seconds=30, sampling="segments") == numbers(kept, fps, sampling="segments")


def test_what_cannot_be_done_says_so() -> None:
    with pytest.raises(VideoTooShort, match="it has 3 frames"):
        numbers(3, short="drop")
    assert numbers(3, short="loop") == [0, 1, 2, 0, 1, 2, 0, 1]
    with pytest.raises(VideoError, match="first_seconds=None"):
        Preprocessing(8, 32, first_seconds=30).frame_numbers(FILE, 40, None)
    with pytest.raises(ValueError, match="views.crops is 3; allowed: 1"):
        Views(crops=3).check(Preprocessing(8, 32, crop="stretch"))


def test_stretched_frames_keep_all_of_the_picture() -> None:
    """A bright column at the border of a wide frame is there, where the middle crop has lost it."""
    image = torch.zeros(32, 96, 3, dtype=torch.uint8)
    image[:, 90:] = 255
    stretched, middle = (Preprocessing(8, 32, crop=crop).prepare(image) for crop in ("stretch", "centre"))
    white, black = ((torch.tensor([v] * 3) - torch.tensor(MEAN)) / torch.tensor(STD) for v in (1.0, 0.0))
    assert torch.allclose(stretched[:, 16, -1], white, atol=0.2) and torch.allclose(middle[:, 16, -1], black, atol=1e-5)
    assert stretched.shape == (3, 32, 32)
    [crop] = Views().crops_of(image, Preprocessing(8, 32, crop="stretch"))
    assert torch.equal(crop, stretched)
