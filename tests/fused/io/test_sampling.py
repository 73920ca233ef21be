"""Which frames make a clip: short videos, rates, rectangular sizes."""

import random
from collections import Counter
from pathlib import Path

import pytest
import torch
from videos import STEP, encode, write_video

from fused.io.preprocessing import Preprocessing
from fused.io.sampling import frames_at_rate, middle_frames, segment_frames
from fused.io.video import MEAN, STD, VideoTooShort
from fused.train import ClipFolder


def indices(total: int, times: list[int | float] | None = None, seed: int | None = None, **options: object) -> list[int]:
    preprocessing = Preprocessing(size=8, **options)  # type: ignore[arg-type]
    return preprocessing.frame_numbers(Path("a.mp4"), total, times, None if seed is None else random.Random(seed))


@pytest.mark.parametrize(
    ("options", "total", "wanted"),
    [
        ({"frames": 4, "short": "loop"}, 3, [0, 1, 2, 0]),
        ({"frames": 4, "short": "last"}, 3, [0, 1, 2, 2]),
        ({"frames": 6, "short": "loop"}, 1, [0] * 6),
        ({"frames": 6, "short": "last"}, 2, [0, 1, 1, 1, 1, 1]),
        ({"frames": 3, "sampling": "dense", "stride": 4, "short": "loop"}, 6, [0, 4, 2]),
        ({"frames": 3, "sampling": "dense", "stride": 4, "short": "last"}, 6, [0, 4, 5]),
        ({"frames": 2, "short": "loop"}, 8, [2, 6]),
        ({"frames": 2, "short": "last"}, 8, [2, 6]),
    ],
)
def test_short_videos(options: dict[str, object], total: int, wanted: list[int]) -> None:
    assert indices(total, **options) == wanted
    drawn = [indices(total, seed=seed, **options) for seed in range(20)]
    assert all(len(one) == options["frames"] and max(one) < total for one in drawn)


@pytest.mark.parametrize(
    ("options", "total", "wrong"),
    [
        ({"frames": 4}, 3, "it has 3 frames; allowed are videos of at least 4 frames; short=loop"),
        ({"frames": 3, "sampling": "dense", "stride": 4}, 8, "it has 8 frames; .* 9 frames, 3 that are 4 apart"),
    ],
)
def test_short_video_is_dropped(options: dict[str, object], total: int, wrong: str) -> None:
    with pytest.raises(VideoTooShort, match=f"a.mp4: too short: {wrong}"):
        indices(total, **options)


def test_a_part_of_a_video_begins_and_ends_at_the_nearest_frame() -> None:
    assert middle_frames(10, 4, 0.0, 0.37) == [0, 1, 2, 3] and middle_frames(10, 4, 0.0, 0.34) == []
    assert middle_frames(10, 4, 0.26, 0.7) == [3, 4, 5, 6]


def test_every_frame_of_a_segment_is_drawn() -> None:
    drawn = [segment_frames(8, 2, random.Random(seed)) for seed in range(60)]
    assert {first for first, _ in drawn} == {0, 1, 2, 3} and {second for _, second in drawn} == {4, 5, 6, 7}


@pytest.mark.parametrize(
    ("times", "fps", "wanted"),
    [
        ([0, 0.1, 0.2, 0.3, 0.4], 10, [0, 1, 2, 3, 4]),
        ([0, 0.1, 0.2, 0.3, 0.4], 5, [0, 2]),  # until half a second
        ([0, 0.1, 0.2, 0.3, 0.4, 0.5], 5, [0, 2, 4]),
        ([0, 0.1, 0.2], 20, [0, 0, 1, 1, 2, 2]),
        ([0, 1.0, 1.1, 1.2, 3.0], 2, [0, 0, 1, 3, 3, 3, 4, 4, 4]),  # a frame stands until the next one
        ([0], 30, [0]),
        ([0, 1 / 3, 2 / 3], 3, [0, 1, 2]),
    ],
)
def test_frames_at_a_rate(times: list[int | float], fps: int | float, wanted: list[int]) -> None:
    assert frames_at_rate(times, fps) == wanted


def test_rate_of_a_video_with_a_variable_one(tmp_path: Path) -> None:
    """Frames 0 to 9 within a second, then frames 10 to 13 a second apart: by number most are early, by time late."""
    times = [*range(0, 20, 2), *range(25, 125, 25)]
    (tmp_path / "a").mkdir()
    encode(tmp_path / "a" / "vfr.mp4", "libx264", frames=14, times=times)
    clips = {fps: ClipFolder(tmp_path, 5, 16, train=False, fps=fps) for fps in (None, 1)}
    by_number, by_time = (clips[fps].sample(0, 0).clip for fps in (None, 1))
    every = ClipFolder(tmp_path, 14, 16, train=False).sample(0, 0).clip
    assert torch.equal(by_number, every[:, [1, 4, 7, 9, 12]])
    assert torch.equal(by_time, every[:, [0, 10, 11, 12, 13]])


def test_looped_clip_has_the_video_again(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    write_video(tmp_path / "a" / "short.mp4", frames=3, width=48, height=32)
    for short, wanted in (("loop", [0, 1, 2, 0, 1, 2, 0]), ("last", [0, 1, 2, 2, 2, 2, 2])):
        clip = ClipFolder(tmp_path, 7, 16, train=True, short=short, scale=(1, 1), flip=0).sample(0, 0).clip
        grey = ((clip[1].flatten(1).mean(1) * STD[1] + MEAN[1]) * 255 - 20) / STEP
        assert grey.round().int().tolist() == wanted


def test_rectangular_clips_keep_the_shape_of_things(tmp_path: Path, unchecked: None) -> None:
    (tmp_path / "a").mkdir()
    encode(tmp_path / "a" / "wide.mp4", "libx264", frames=4, width=192, height=96)
    whole = ClipFolder(tmp_path, 2, (48, 96), train=False).sample(0, 0).clip
    assert whole.shape == (3, 2, 48, 96)
    square = ClipFolder(tmp_path, 2, 48, train=False).sample(0, 0).clip
    assert torch.equal(square, whole[..., 24:72])  # the same scale, the middle of the long side
    shapes = Counter(ClipFolder(tmp_path, 2, (48, 96), train=True).sample(0, epoch).clip.shape for epoch in range(4))
    assert shapes == {(3, 2, 48, 96): 4}
    for size in ((48, 0), (1, 2, 3)):
        with pytest.raises(ValueError, match=r"size is \(.*\); allowed: pixels of a side, or \[height, width\]"):
            ClipFolder(tmp_path, 2, size, train=False)  # type: ignore[arg-type]
