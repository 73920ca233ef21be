"""Repeated sampling: several clips of the same frames of a video in a step, each with other random changes."""

import signal
from pathlib import Path

import pytest
import torch
from trainings import SMALL, class_folders, signal_at_step, train
from videos import write_video

from fused.train import ClipFolder, batches
from fused.train.config_file import read_config
from harness.instruments.two_processes import log, steps


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of four videos whose grey value tells the frame."""
    root = tmp_path_factory.mktemp("videos")
    for i in range(4):
        write_video(root / f"{i}.avi", frames=40, width=64, height=48)
    return root


def test_clips_of_a_video_have_the_same_frames_and_other_crops(folder: Path) -> None:
    options = {"train": True, "scale": (0.3, 0.5), "flip": 0.5, "dtype": torch.uint8}
    once, thrice = ClipFolder(folder, 4, 32, **options, erased=0.5), ClipFolder(folder, 4, 32, **options, erased=0.5, repeats=3)
    assert thrice.shape == (3, 3, 4, 32, 32) and once.shape == (3, 4, 32, 32)
    boxes = set()
    for epoch in range(4):
        clips = thrice.sample(1, epoch).clip
        assert clips.shape == thrice.shape and torch.equal(clips, thrice.sample(1, epoch).clip)
        greys = clips.flatten(3).mode(-1).values  # the frame's value, beside the noise of a box
        assert torch.equal(greys[0], greys[1]) and torch.equal(greys[0], greys[2])
        boxes |= {int((clip != grey[..., None, None]).sum()) for clip, grey in zip(clips, greys, strict=True)}
        assert torch.equal(greys[0], once.sample(1, epoch).clip.flatten(2).mode(-1).values)
    assert len(boxes) > 4  # no two clips have the same box
    assert ClipFolder(folder, 4, 32, train=False, repeats=3).shape == (3, 4, 32, 32)  # an evaluation has each video once


def test_batches_put_clips_of_a_video_apart(folder: Path) -> None:
    """First one clip of each video, then the second of each: neighbours, which are mixed, are of different videos."""
    dataset = ClipFolder(folder, 2, 32, train=True, repeats=2)
    for workers in (0, 1):
        whole = list(batches(dataset, 2, epoch=1, seed=0, workers=workers))
        assert len(whole) == 2 and all(batch.clips.shape == (4, 3, 2, 32, 32) for batch in whole)
        for batch in whole:
            first, second, *again = batch.indices.tolist()
            assert again == [first, second] != [second, first] and len(batch.labels) == 4
            for place, index in enumerate(batch.indices.tolist()):
                assert torch.equal(batch.clips[place], dataset.sample(index, 1).clip[place // 2])
    ranks = [list(batches(dataset, 1, epoch=1, seed=0, rank=rank, world=2)) for rank in (0, 1)]
    assert sorted(i for batch in ranks[0] + ranks[1] for i in batch.indices.tolist()) == [0, 0, 1, 1, 2, 2, 3, 3]


def test_a_file_that_cannot_be_read_is_replaced_with_all_its_clips(folder: Path, tmp_path: Path) -> None:
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes() if path.stem != "2" else b"no video")
    dataset = ClipFolder(tmp_path, 2, 32, train=True, repeats=2)
    found = list(batches(dataset, 2, epoch=0, seed=0))
    assert sum(len(batch.bad) for batch in found) == 1 and all(len(batch.clips) == 4 for batch in found)
    assert all(2 not in batch.indices for batch in found)


def test_training(tmp_path: Path) -> None:
    """batch_size counts clips, an epoch has each video once, and a stopped run goes on with the same bits."""
    data = class_folders(tmp_path / "videos", 4)
    words = [*SMALL, f"data.train={data}", "task=finetune", "data.repeats=2", "data.augment=rand-m5-n2", "batch_size=8"]
    code, text = train([*words, f"out={tmp_path / 'run'}", "epochs=2"], folder=tmp_path)
    assert code == 0 and "8 videos in 2 classes, 2 steps an epoch, 4 steps" in text, text
    assert log(tmp_path / "run")[-1]["step"] == 4
    whole, parts = ([*words, "epochs=8", "optim.warmup_epochs=1.5", f"out={tmp_path / name}"] for name in ("whole", "parts"))
    assert signal_at_step(parts, tmp_path / "parts", 3, signal.SIGINT) == 130
    code, text = train(whole, parts, folder=tmp_path)
    assert code == 0 and "goes on behind step" in text, text
    found = steps(tmp_path / "whole")
    assert [step["lr"] / 3e-3 for step in found[:4]] == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert [step["loss"] for step in found] == [step["loss"] for step in steps(tmp_path / "parts")]


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["data.repeats=0"], "data.repeats is 0; allowed: a positive integer"),
        (["data.repeats=3", "batch_size=8"], r"data.repeats is 3; allowed: a divisor of batch_size / accumulate \(8\)"),
        (["data.repeats=4", "batch_size=8", "accumulate=4"], r"data.repeats is 4; allowed: a divisor of batch_size"),
        (["optim.warmup_epochs=-1"], "optim.warmup_epochs is -1; allowed: a number from 0 up, or None"),
        (["optim.warmup_epochs=1", "optim.warmup_steps=5"], "optim.warmup_epochs is 1; allowed: null with optim.warmup_steps"),
        (["task=retrieval", "data.repeats=2"], "data.repeats is given; task 'retrieval' does not read it"),
        (["task=retrieval", "data.augment=v0"], "data.augment is given; task 'retrieval' does not read it"),
        (["num_sample=2"], "num_sample is no key; the nearest is data.repeats"),
        (["warmup_epochs=2"], "warmup_epochs is no key; the nearest is optim.warmup_epochs"),
    ],
)
def test_errors(words: list[str], wanted: str) -> None:
    with pytest.raises(ValueError, match=wanted):
        read_config(None, words, complete=False)


def test_errors_of_a_training(tmp_path: Path) -> None:
    data = class_folders(tmp_path / "videos", 2)
    words = [*SMALL, f"data.train={data}", "task=finetune", "steps=2", f"out={tmp_path / 'run'}"]
    for more, wanted in (
        (["data.repeats=2", "batch_size=12"], "batch_size is 12; allowed: up to 2 times the 4 videos"),
        (["optim.warmup_epochs=3"], "optim.warmup_epochs is 3, 3 steps; allowed: fewer than the 2 steps of the training"),
    ):
        code, text = train([*words, *more], folder=tmp_path)
        assert code == 2 and wanted in text, text
