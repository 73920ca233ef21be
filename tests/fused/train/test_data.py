"""Clips of folders: listing, random frames and crops, batches of ranks and workers, and unreadable files."""

import multiprocessing
import os
import random
import signal
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from torch import Tensor
from videos import STEP, cut, write_video

from fused.io.video import MEAN, STD, VideoError, read_clip
from fused.train import Batch, ClipFolder, batches
from fused.train.data.augment import Crop
from fused.train.data.batches import UnreadableFiles

FRAMES, SIZE = 3, 16
GOOD = ["0.mp4", "2.mp4", "1.mp4", "3.mp4"]


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of ten videos of 9 to 18 frames in two classes."""
    root = tmp_path_factory.mktemp("videos")
    for i in range(10):
        folder = root / "ab"[i % 2] / "nested"
        folder.mkdir(parents=True, exist_ok=True)
        write_video(folder / f"{i}.mp4", frames=9 + i, width=48, height=32)
    return root


@pytest.fixture
def list_with_bad_files(tmp_path: Path, videos: Path) -> Path:
    """Return a list of eight files, four of them unreadable: missing, too short, truncated, not a video."""
    write_video(tmp_path / "short.mp4", frames=FRAMES - 1)
    cut(write_video(tmp_path / "cut.mp4"), 0.5)
    (tmp_path / "text.mp4").write_text("no video")
    good = [str(videos / "ab"[int(name[0]) % 2] / "nested" / name) for name in GOOD]
    lines = [f"{name},{i % 2}" for i, name in enumerate(["missing.mp4", "short.mp4", "cut.mp4", "text.mp4", *good])]
    (tmp_path / "list.csv").write_text("\n".join(lines))
    return tmp_path / "list.csv"


def folder(root: Path, **other: Any) -> ClipFolder:
    return ClipFolder(root, FRAMES, SIZE, **{"train": True} | other)


def listed(tmp_path: Path, text: str) -> ClipFolder:
    (tmp_path / "list.csv").write_text(text)
    return folder(tmp_path / "list.csv")


def same(left: Iterable[Batch], right: Iterable[Batch]) -> bool:
    left, right = list(left), list(right)
    return len(left) == len(right) and all(
        torch.equal(a.clips, b.clips)
        and torch.equal(a.labels, b.labels)
        and torch.equal(a.indices, b.indices)
        and a.bad == b.bad
        for a, b in zip(left, right, strict=True)
    )


def grey(clip: Tensor) -> list[int]:
    """Return the frame number of each frame of a clip (3, T, H, W) of a synthetic video."""
    return (((clip[1].flatten(1).mean(1) * STD[1] + MEAN[1]) * 255 - 20) / STEP).round().int().tolist()


def test_folder_of_classes(videos: Path, tmp_path: Path) -> None:
    found = folder(videos)
    assert found.classes == ("a", "b") and found.labels == (0,) * 5 + (1,) * 5
    assert [f.name for f in found.files] == [f"{i}.mp4" for i in (0, 2, 4, 6, 8, 1, 3, 5, 7, 9)]
    assert folder(videos, classes=["b", "new", "a"]).labels == (2,) * 5 + (0,) * 5
    assert folder(videos, classes=()).labels == (-1,) * 10 and folder(videos, classes=()).classes == ()
    for name in ("linked", ".hidden"):
        (tmp_path / name).symlink_to(videos / "a")
    assert folder(tmp_path).classes == ("linked",) and len(folder(tmp_path)) == 5


def test_flat_folder(tmp_path: Path) -> None:
    for name in ("b.MKV", "a.mp4", ".hidden.mp4", "readme.txt"):
        (tmp_path / name).touch()
    found = folder(tmp_path)
    assert [f.name for f in found.files] == ["a.mp4", "b.MKV"] and found.labels == (-1, -1) and found.classes == ()


def test_folders_that_do_not_fit(tmp_path: Path, videos: Path) -> None:
    for root, classes, message in [
        (tmp_path / "nowhere", None, "there is no .*nowhere"),
        (tmp_path, None, r"suffixes .*\.mp4.* there is none in"),
        (videos, ["a"], "has the class 'b'; allowed are 'a'"),
        (videos / "a" / "nested", ["a"], "the videos of .* have none"),
        (videos, ["a", "a"], "names that differ"),
    ]:
        with pytest.raises(ValueError, match=message):
            folder(root, classes=classes)
    (videos.parent / "both").mkdir(exist_ok=True)
    for name in ("a", "extra.mp4"):
        (videos.parent / "both" / name).symlink_to(videos / "a" / "nested" / ("" if name == "a" else "0.mp4"))
    with pytest.raises(ValueError, match="extra.mp4 has none, and others have one"):
        folder(videos.parent / "both")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"frames": 0}, "frames must be an integer from 1"),
        ({"size": 1.5}, r"size is 1.5; allowed: pixels of a side, or \[height, width\]"),
        ({"size": (32, 0)}, r"size is \(32, 0\); allowed: pixels of a side"),
        ({"size": (32,)}, r"size is \(32,\); allowed: pixels of a side"),
        ({"fps": 0}, "fps is 0; allowed: a positive number"),
        ({"fps": "fast"}, "fps is 'fast'; allowed: a positive number"),
        ({"short": "skip"}, "short is 'skip'; allowed: one of 'drop', 'loop', 'last'"),
        ({"sampling": "sparse"}, "sampling is 'sparse'; allowed: one of 'segments', 'dense'"),
        ({"stride": 0}, "stride is 0; allowed: a positive integer"),
        ({"scale": (0, 1)}, r"scale's least must be a number in \(0, 1\]"),
        ({"scale": (0.9, 0.5)}, r"scale's most must be a number in \[0.9, 1\]"),
        ({"flip": 2}, "flip must be"),
        ({"seed": -1}, "seed must be"),
        ({"classes": "ab"}, "classes must be a sequence of names"),
    ],
)
def test_arguments_out_of_range(videos: Path, wrong: dict[str, Any], message: str, unchecked: None) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        ClipFolder(videos, **{"frames": 2, "size": 8, "train": True} | wrong)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"batch_size": 0}, "batch_size must be"),
        ({"rank": 2, "world": 2}, "rank must be an integer from 0 to 1"),
        ({"skip": 4}, "skip must be an integer from 0 to 3"),
        ({"batch_size": 11}, "got 10; a step takes batch_size .* 11 . 1"),
        ({"world": 4}, "3 . 4"),
    ],
)
def test_batches_out_of_range(videos: Path, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        batches(folder(videos), **{"batch_size": 3, "epoch": 0, "seed": 0} | wrong)


def test_evaluation_is_what_read_clip_gives(videos: Path) -> None:
    found = folder(videos, train=False)
    read = list(batches(found, 4, epoch=0, seed=0, shuffle=False, drop_last=False))
    assert [len(b.clips) for b in read] == [4, 4, 2] and torch.cat([b.labels for b in read]).tolist() == list(found.labels)
    clips = torch.cat([b.clips for b in read])
    assert torch.equal(clips, torch.stack([read_clip(file, FRAMES, SIZE) for file in found.files]))


def test_random_frames(videos: Path) -> None:
    """One frame of each segment, or frames `stride` apart; every possible choice occurs over the epochs."""
    segments, dense = folder(videos), folder(videos, sampling="dense", stride=3)
    picked = [grey(segments.sample(0, epoch).clip) for epoch in range(30)]  # of 9 frames
    assert [set(column) for column in zip(*picked, strict=True)] == [{0, 1, 2}, {3, 4, 5}, {6, 7, 8}]
    assert {tuple(grey(dense.sample(0, epoch).clip)) for epoch in range(30)} == {(i, i + 3, i + 6) for i in range(3)}
    middle = folder(videos, sampling="dense", stride=2, train=False)
    assert [grey(middle.sample(0, epoch).clip) for epoch in range(3)] == [[2, 4, 6]] * 3
    with pytest.raises(VideoError, match=r"too short: it has 9 frames; .* at least 11 frames, 3 that are 5 apart"):
        folder(videos, sampling="dense", stride=5).sample(0, 0)


def test_random_crops(tmp_path: Path) -> None:
    """A crop is the same for all frames, and differs by file, epoch and seed; all positions and mirrorings occur."""
    write_video(tmp_path / "still.mp4", frames=6, width=96, height=64, side=8, step=0)
    (tmp_path / "twin.mp4").symlink_to(tmp_path / "still.mp4")
    found = folder(tmp_path, scale=(0.1, 1), flip=0)
    clips = [found.sample(0, epoch).clip for epoch in range(40)]
    assert all((clip == clip[:, :1]).all() for clip in clips)
    bright = [tuple((clip[1, 0, 0, [0, -1]] > 1).tolist()) for clip in clips]
    assert set(bright) == {(False, False), (True, False), (False, True)}
    whole = [folder(tmp_path, scale=(1, 1), flip=flip).sample(0, 0).clip for flip in (0, 1)]  # the same part, and mirrored
    assert torch.equal(whole[0], whole[1].flip(-1)) and not torch.equal(*whole)
    assert not torch.equal(*(found.sample(index, 0).clip for index in range(2)))
    assert not torch.equal(*(folder(tmp_path, seed=seed).sample(0, 0).clip for seed in range(2)))


def test_a_crop_reaches_every_edge_and_has_its_area() -> None:
    image = torch.arange(48, dtype=torch.uint8).view(4, 4, 3)
    corner = Crop(area=0.25, aspect=1.0, top=0.99, left=0.0, mirrored=False).cut(image, 2)
    torch.testing.assert_close(corner, image[2:, :2].permute(2, 0, 1) / 255)
    assert Crop.sample(random.Random(0), (0.5, 0.5), 0.0).area == 0.5


def test_bytes_are_the_nearest(videos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Crop, "cut", lambda self, image, size: torch.full((3, SIZE, SIZE), 0.999))  # of 255: 254.7
    assert folder(videos, dtype=torch.uint8).sample(0, 0).clip.unique().tolist() == [255]


def test_bits_depend_neither_on_workers_nor_on_skipping(videos: Path) -> None:
    found, state = folder(videos), torch.get_rng_state()
    whole = list(batches(found, 3, epoch=4, seed=1))
    assert len(whole) == len(batches(found, 3, epoch=4, seed=1)) == 3
    assert same(whole, batches(found, 3, epoch=4, seed=1, workers=2))
    assert same(whole[1:], batches(found, 3, epoch=4, seed=1, skip=1)) and len(batches(found, 3, epoch=4, seed=1, skip=1)) == 2
    assert not list(batches(found, 3, epoch=4, seed=1, skip=3))
    others = [batches(found, 3, epoch=epoch, seed=seed) for epoch, seed in ((5, 1), (4, 2))]
    assert all([b.indices.tolist() for b in whole] != [b.indices.tolist() for b in other] for other in others)
    assert torch.equal(torch.get_rng_state(), state)


def test_skipped_files_are_not_read(videos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, read = folder(videos), []
    monkeypatch.setattr(found, "sample", lambda index, epoch: read.append(index) or ClipFolder.sample(found, index, epoch))
    (last,) = batches(found, 3, epoch=0, seed=0, skip=2)
    assert read == last.indices.tolist()


def test_ranks_divide_the_batches_of_one(videos: Path) -> None:
    found = folder(videos)
    whole = list(batches(found, 4, epoch=0, seed=0))
    parts = [list(batches(found, 2, epoch=0, seed=0, rank=rank, world=2)) for rank in range(2)]
    for one, *two in zip(whole, *parts, strict=True):
        assert torch.equal(one.indices, torch.cat([b.indices for b in two]))
        assert torch.equal(one.clips, torch.cat([b.clips for b in two]))


@pytest.mark.parametrize("world", [1, 3, 4])
def test_evaluation_sees_every_file_once(videos: Path, world: int) -> None:
    parts = [
        list(batches(folder(videos, train=False), 3, epoch=0, seed=0, rank=rank, world=world, drop_last=False))
        for rank in range(world)
    ]
    assert len({len(part) for part in parts}) == 1
    assert sorted(i for part in parts for b in part for i in b.indices.tolist()) == list(range(10))
    assert all(len(b.clips) == len(b.labels) == len(b.indices) <= 3 for part in parts for b in part)


def test_bad_files_are_replaced_and_named(list_with_bad_files: Path) -> None:
    found = folder(list_with_bad_files)
    assert [file.name for file in found.files] == ["cut.mp4", "missing.mp4", "short.mp4", "text.mp4", *GOOD]
    read = list(batches(found, 2, epoch=0, seed=0, shuffle=False))
    assert [b.indices.tolist() for b in read] == [[4, 5], [4, 5], [4, 5], [6, 7]]  # replaced by the next readable one
    assert [len(b.bad) for b in read] == [4, 2, 0, 0]
    assert all(said.startswith(f"{file}: ") for file, said in zip(found.files, read[0].bad, strict=False))
    assert torch.equal(read[0].clips, read[2].clips) and torch.equal(read[0].labels, read[2].labels)
    assert same(read, batches(found, 2, epoch=0, seed=0, shuffle=False, workers=1))
    mixed = [b.indices.tolist() for b in batches(found, 3, epoch=0, seed=0, shuffle=False)]
    assert mixed == [[4, 5, 6], [4, 5, 6]]  # of text, 0 and 2 the first by what comes behind them
    ranks = [list(batches(found, 1, epoch=0, seed=0, shuffle=False, rank=rank, world=2)) for rank in range(2)]
    assert [[b.indices.item() for b in rank] for rank in ranks] == [[4, 4, 4, 6], [5, 5, 5, 7]]  # never both the same


def test_bad_files_are_left_out_of_evaluation(list_with_bad_files: Path) -> None:
    read = list(batches(folder(list_with_bad_files, train=False), 3, epoch=0, seed=0, shuffle=False, drop_last=False))
    assert [b.indices.tolist() for b in read] == [[], [4, 5], [6, 7]] and [len(b.bad) for b in read] == [3, 1, 0]
    assert [len(b.clips) for b in read] == [len(b.labels) for b in read] == [0, 2, 2]


@pytest.mark.parametrize("count", [3, 100])
def test_no_file_can_be_read(tmp_path: Path, count: int) -> None:
    found = listed(tmp_path, "\n".join(f"missing{i}.mp4,0" for i in range(count)))
    with pytest.raises(RuntimeError, match="none of .* files can be read: .*missing.*no such file"):
        list(batches(found, 2, epoch=0, seed=0))
    empty = list(batches(found, 100, epoch=0, seed=0, drop_last=False))
    assert [b.clips.shape for b in empty] == [(0, 3, FRAMES, SIZE, SIZE)] and len(empty[0].bad) == count


def test_many_bad_files_that_are_not_consecutive(tmp_path: Path, videos: Path) -> None:
    for name in ("b.mp4", "d.mp4"):
        (tmp_path / name).symlink_to(videos / "a" / "nested" / "0.mp4")
    found = listed(tmp_path, "".join(f"a{i:02}.mp4\nc{i:02}.mp4\n" for i in range(20)) + "b.mp4\nd.mp4\n")
    (first,) = list(batches(found, 40, epoch=0, seed=0, shuffle=False))[:1]
    assert len(first.clips) == 40 and len(first.bad) == 40


class DyingFolder(ClipFolder):
    def sample(self, index: int, epoch: int) -> NoReturn:
        os._exit(3)


def test_error_of_a_worker_has_no_traceback(tmp_path: Path) -> None:
    found = listed(tmp_path, "missing0.mp4\nmissing1.mp4\n")
    with pytest.raises(UnreadableFiles, match="^batches: none of 2 files can be read: .*missing.*no such file") as caught:
        list(batches(found, 2, epoch=0, seed=0, workers=1))
    assert "Traceback" not in str(caught.value)


def test_dead_worker_is_named(videos: Path) -> None:
    found = DyingFolder(videos, FRAMES, SIZE, train=True)
    with pytest.raises(RuntimeError, match="DataLoader worker .* exited unexpectedly"):
        list(batches(found, 2, epoch=0, seed=0, workers=1))


def test_workers_ignore_interrupts(videos: Path) -> None:
    """Ctrl-C signals all processes of a terminal; workers continue until the training ends them."""
    found, others = folder(videos), multiprocessing.active_children()  # of a test before
    reading = iter(batches(found, 1, epoch=0, seed=0, workers=2))
    read = [next(reading)]
    workers = [process for process in multiprocessing.active_children() if process not in others]
    for worker in workers:
        os.kill(worker.pid, signal.SIGINT)
    assert len(workers) == 2 and all(worker.is_alive() for worker in workers)
    assert same(read + list(reading), batches(found, 1, epoch=0, seed=0))
    assert not any(worker.is_alive() for worker in workers)
