"""Random erasing: one box of a clip becomes noise, and nothing else changes."""

import random
from pathlib import Path

import pytest
import torch
from torch import Tensor
from videos import write_video

from fused.io.picture import MEAN, STD
from fused.train import ClipFolder
from fused.train.config_file import read_config
from fused.train.data.augment import ERASED, erase


def box(changed: Tensor) -> tuple[int, int, int, int]:
    """Return top, bottom, left, right of the pixels that changed in any frame or channel, (..., H, W)."""
    pixels = changed.flatten(0, -3).any(0)
    rows, columns = pixels.any(1).nonzero().flatten(), pixels.any(0).nonzero().flatten()
    return int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1


@pytest.mark.parametrize("shape", [(3, 4, 40, 56), (3, 40, 56)])
def test_one_box_of_all_frames_is_noise(shape: tuple[int, ...]) -> None:
    clip, shares = torch.full(shape, 9.0), []
    for seed in range(40):
        erased = erase(clip, random.Random(seed))
        assert torch.equal(erased, erase(clip, random.Random(seed)))
        top, bottom, left, right = box(erased != clip)
        noise = erased[..., top:bottom, left:right]
        assert (noise != 9).all() and noise.abs().max() < 9  # the box and nothing but the box
        shares.append((bottom - top) * (right - left) / (40 * 56))
    slack = 0.01  # sides are rounded to pixels
    assert ERASED[0] - slack < min(shares) < 0.1 and 0.25 < max(shares) < ERASED[1] + slack
    assert (clip == 9).all()


def test_noise_has_mean_0_and_deviation_1_after_normalisation() -> None:
    clip = torch.zeros(3, 8, 200, 200, dtype=torch.uint8)
    erased = erase(clip, random.Random(1))
    top, bottom, left, right = box(erased != 0)
    noise = erased[..., top:bottom, left:right].float().flatten(1) / 255
    assert not torch.equal(erased[:, 0], erased[:, 1])  # another in every frame
    normal = ((noise[0] - MEAN[0]) / STD[0]).sort().values
    median, high = normal[len(normal) // 2], normal[int(len(normal) * 0.8413)]
    # bytes end 2.1 deviations from the mean, so that quantiles are compared; 1/255 is 0.017 deviations
    assert abs(median) < 0.03 and abs(high - 1) < 0.03


def test_clips_of_a_training(tmp_path: Path) -> None:
    write_video(tmp_path / "a.avi", frames=4, width=64, height=64)
    options = {"train": True, "dtype": torch.uint8}
    plain, never, always, some = (
        ClipFolder(tmp_path, 4, 32, **options, **more)
        for more in ({}, {"erased": 0.0}, {"erased": 1.0}, {"erased": 0.5})
    )
    for epoch in range(3):  # the crop is the same with and without
        clip, erased = plain.sample(0, epoch).clip, always.sample(0, epoch).clip
        assert torch.equal(clip, never.sample(0, epoch).clip)
        top, bottom, left, right = box(clip != erased)
        assert 0 < (bottom - top) * (right - left) < 32 * 32 / 2
    hits = sum(not torch.equal(plain.sample(0, epoch).clip, some.sample(0, epoch).clip) for epoch in range(40))
    assert 8 < hits < 32  # 40 of one half: 4 standard deviations
    evaluated, due = (ClipFolder(tmp_path, 4, 32, train=False, erased=share).sample(0, 0) for share in (1.0, 0.0))
    assert torch.equal(evaluated.clip, due.clip)


def test_key() -> None:
    assert read_config(None, ["data.erased=0.25"], complete=False).data.erased == 0.25
    with pytest.raises(ValueError, match="data.erased is 2; allowed: a number from 0 to 1"):
        read_config(None, ["data.erased=2"], complete=False)
    with pytest.raises(ValueError, match="data.reprob is no key; the nearest is data.erased"):
        read_config(None, ["data.reprob=0.25"], complete=False)
