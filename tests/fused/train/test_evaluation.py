"""Evaluation: every listed video counts, those that gave no clip as wrong; top-5 only of more than five classes."""

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from videos import write_video

from fused.train import ClipFolder
from fused.train.evaluation import evaluate
from fused.train.parallel import World
from fused.train.tasks import Task

CPU = World(torch.device("cpu"))


class Fixed(Task):
    """A task that gives every clip the same logits."""

    def __init__(self, *logits: float) -> None:
        super().__init__()
        self.student, self.fixed = nn.Identity(), torch.tensor(logits)

    def logits(self, clips: Tensor) -> Tensor:
        return self.fixed.expand(len(clips), -1)


def videos(root: Path, classes: int) -> Path:
    """Write a video for each class."""
    for i in range(classes):
        (root / f"class{i}").mkdir(parents=True)
        write_video(root / f"class{i}" / "good.avi", frames=4, width=32, height=32)
    return root


def evaluated(root: Path, *logits: float) -> dict[str, float]:
    evaluation = evaluate(Fixed(*logits), ClipFolder(root, 4, 16, train=False), 3, CPU, nullcontext())
    assert evaluation is not None
    return evaluation.results


@pytest.mark.parametrize("workers", [0, 1])
def test_videos_that_are_not_read_count(tmp_path: Path, workers: int) -> None:
    root = videos(tmp_path, 2)
    (root / "class0/broken.avi").write_bytes(b"no video")
    (root / "class1/empty.avi").touch()
    write_video(root / "class1/short.avi", frames=3)
    evaluation = evaluate(Fixed(1, 0), ClipFolder(root, 4, 16, train=False), 3, CPU, nullcontext(), workers)
    assert evaluation is not None
    assert evaluation.results == {
        "val_top1": 1 / 2, "val_top1_all": 1 / 5, "val_read": 2, "val_listed": 5, "val_too_short": 1, "val_unreadable": 2,
    }  # fmt: skip
    assert {Path(file.path).name: file.too_short for file in evaluation.bad_files} == {
        "broken.avi": False, "empty.avi": False, "short.avi": True
    }  # fmt: skip


def test_no_video_is_read(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "broken.avi").write_bytes(b"no video")
    results = evaluated(tmp_path, 1, 0)
    assert results["val_top1"] == results["val_top1_all"] == results["val_read"] == 0 and results["val_unreadable"] == 2


def test_top5(tmp_path: Path) -> None:
    """With six classes the last one is not among the first five; with five classes every answer would be right."""
    assert "val_top5" not in evaluated(videos(tmp_path / "five", 5), 5, 4, 3, 2, 1)
    results = evaluated(videos(tmp_path / "six", 6), 6, 5, 4, 3, 2, 1)
    assert results["val_top5"] == 5 / 6 and results["val_top1"] == results["val_top1_all"] == 1 / 6
