"""When a training saves: every `save_every` steps and `save_minutes` minutes, in all processes at the same step."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from trainings import SMALL, class_folders, train

from fused.train import loop
from harness.instruments.two_processes import Training, run_trainings


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return the arguments of a training of six steps that keeps all checkpoints, without its folder."""
    videos = class_folders(tmp_path_factory.mktemp("saving") / "videos", 4)
    return [*SMALL, "task=finetune", "steps=6", "keep=9", f"data.train={videos}"]


def saved(run: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (run / "checkpoints").glob("step-*"))


class Clock:
    """A replacement of the module `time` whose clock is a minute later at each look, in the process of rank `rank` only."""

    perf_counter = staticmethod(time.perf_counter)

    def __init__(self, rank: str) -> None:
        self.rank, self.seconds = rank, 0.0

    def monotonic(self) -> float:
        self.seconds += 60.0 * (os.environ.get("RANK", "0") == self.rank)
        return self.seconds


def clock_of_rank_0() -> None:
    loop.time = Clock("0")


def clock_of_rank_1() -> None:
    loop.time = Clock("1")


@pytest.mark.parametrize(
    ("more", "wanted"),
    [
        (["save_minutes=2"], [2, 4, 6]),
        (["save_minutes=2", "save_every=3"], [2, 3, 5, 6]),
        (["save_minutes=null", "save_every=4"], [4, 6]),
        (["save_minutes=null", "save_every=null"], [6]),
    ],
)
def test_steps_and_minutes(words: list[str], more: list[str], wanted: list[int], tmp_path: Path) -> None:
    code, output = train([*words, *more, f"out={tmp_path / 'run'}"], fault=clock_of_rank_0, folder=tmp_path)
    assert code == 0 and saved(tmp_path / "run") == wanted, output


@pytest.mark.parametrize(("clock", "wanted"), [(clock_of_rank_0, [2, 4, 6]), (clock_of_rank_1, [6])])
def test_clock_of_rank_0_decides(words: list[str], clock: Callable[[], None], wanted: list[int], tmp_path: Path) -> None:
    run_trainings([Training((*words, "save_minutes=2", f"out={tmp_path / 'run'}"), in_two_processes=True)], tmp_path, clock)
    assert saved(tmp_path / "run") == wanted
