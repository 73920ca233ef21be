"""`python -m fused.train` with steps that are recorded, and read a step later, as on a GPU: the same log and tensors."""

import json
import os
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tape import TapeRecorder
from trainings import SMALL, class_folders, train

from fused.train import loop, parallel
from fused.train.data.clips import ClipFolder
from harness.instruments.two_processes import Training, log, run_trainings, steps, tensors

STEPS = 9
WORDS = [*SMALL, "task=finetune", f"steps={STEPS}", "model.drop_path_rate=0.3", "ema=0.6", "accumulate=2"]
WORDS += ["optim.clip_grad=0.5", "evaluate_every=4", "save_every=7", "log_every=2"]


def as_on_a_gpu(interrupt_at: int | None = None) -> None:
    """Record the steps of the trainings of this process, read their numbers a step later, and interrupt the first of them."""
    make, step = loop.Trainer.__init__, loop.Trainer._train_step

    def late(self: loop.Trainer, *given: Any) -> None:
        make(self, *given)
        self.delay = 1

    def interrupted(self: loop.Trainer, *given: Any) -> Any:
        if self.step == interrupt_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *given)

    loop.Trainer.__init__, loop.Trainer._train_step = late, interrupted
    loop.choose_recorder = lambda *given: (TapeRecorder(), "graph: tapes")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of videos, one of them broken, and of an eager run of three steps an epoch."""
    folder = tmp_path_factory.mktemp("graphs")
    class_folders(folder / "videos", 7)
    (folder / "videos" / "side0" / "0.avi").write_bytes(b"no video")
    code, output = train(arguments(folder, "eager"), folder=folder)
    assert code == 0 and "graph: auto; steps are eager: the model is on the CPU" in output, output
    return folder


def arguments(folder: Path, run: str, *more: str) -> list[str]:
    return [*WORDS, f"data.train={folder / 'videos'}", f"data.val={folder / 'videos'}", f"out={folder / run}", *more]


def assert_same(first: Path, second: Path, step: int = STEPS) -> None:
    assert log(first) == log(second)
    ours, theirs = (tensors(run / f"checkpoints/step-{step:08d}") for run in (first, second))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_same_run(folder: Path) -> None:
    code, output = train(arguments(folder, "recorded"), fault=as_on_a_gpu, folder=folder)
    assert code == 0 and "graph: tapes" in output, output
    assert_same(folder / "recorded", folder / "eager")


def test_interrupted_and_resumed(folder: Path) -> None:
    """The step that was under way is finished, logged and saved; the run goes on with graphs or without."""
    run = folder / "stopped"
    code, output = train(arguments(folder, "stopped", "log_every=1"), fault=partial(as_on_a_gpu, 4), folder=folder)
    assert code == 130 and "stopped behind step 6 of 9, saved as" in output, output
    assert [line["step"] for line in steps(run)] == [1, 2, 3, 4, 5, 6]
    code, output = train(arguments(folder, "stopped", "graph=off"), fault=None, folder=folder)
    assert code == 0 and "goes on behind step 6" in output and "graph: auto -> off" in output, output
    ours, theirs = (tensors(folder / name / f"checkpoints/step-{STEPS:08d}") for name in ("stopped", "eager"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_loss_that_is_not_finite(folder: Path) -> None:
    """It is noticed a step later; the error names its step, and nothing behind it is logged or saved."""
    more = ["optim.lr=1e30", "log_every=1", "save_every=null", "data.val=null"]
    outputs = []
    for run, fault in (("bad", None), ("bad-recorded", as_on_a_gpu)):
        code, output = train(arguments(folder, run, *more), fault=fault, folder=folder)
        assert code == 1 and "Traceback" not in output, output
        outputs.append(output.splitlines()[-1])
        assert len(steps(folder / run)) == int(outputs[-1].split("step ")[1].split(":")[0]) - 1 > 0
        assert not (folder / run / "checkpoints").exists()
    assert outputs[0] == outputs[1] and "last good checkpoint: there is none yet" in outputs[0]


def test_two_processes(folder: Path) -> None:
    """Gradients are averaged between the graphs of a step."""

    def training(run: str) -> Training:
        return Training((*arguments(folder, run), "parallel=ddp", "batch_size=8"), in_two_processes=True)

    run_trainings([training("eager-2")], folder)
    run_trainings([training("recorded-2")], folder, in_small_buckets)
    assert_same(folder / "recorded-2", folder / "eager-2")


def in_small_buckets() -> None:
    """Average gradients by many collectives, and begin with other weights in the second process, which takes the first's."""
    as_on_a_gpu()
    parallel.BUCKET_BYTES = 1000
    build = loop.tasks.build_task

    def build_another(*given: Any) -> Any:
        task = build(*given)
        if os.environ["RANK"] == "1":
            torch.nn.init.ones_(task.student.cls_token)
        return task

    loop.tasks.build_task = build_another


def test_share_of_the_time_that_steps_waited(folder: Path) -> None:
    """It is in every line of the log, and on the terminal where it is large."""
    code, output = train(arguments(folder, "slow", "steps=2", "log_every=1", "data.val=null"), fault=slow_data, folder=folder)
    assert code == 0, output
    lines = [json.loads(text) for text in (folder / "slow/log.jsonl").read_text().splitlines()]
    assert all(0.5 < line["data_wait"] <= 1 for line in lines if "loss" in line)
    assert "% of the time waiting for data" in output


def slow_data() -> None:
    """Make reading a clip take long, against the other parts of a step."""
    sample = ClipFolder.sample

    def slow(self: ClipFolder, *given: Any) -> Any:
        time.sleep(0.2)
        return sample(self, *given)

    ClipFolder.sample = slow
