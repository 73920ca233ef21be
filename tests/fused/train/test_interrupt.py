"""Ctrl-C, SIGTERM and kill -9, sent to one process of a training or to all: what can be saved is, and no process stays."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from trainings import ROOT, SMALL, class_folders, running_in_group, signal_at_step, train

from fused.train import interrupt, loop
from fused.train.interrupt import Interrupt
from harness.instruments.two_processes import log, tensors


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of 16 videos."""
    return class_folders(tmp_path_factory.mktemp("interrupted") / "videos", 8)


def arguments(videos: Path, run: Path, *more: str) -> list[str]:
    return [*SMALL, "task=finetune", "steps=2000", "data.workers=2", f"data.train={videos}", f"out={run}", *more]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_to_all_processes(videos: Path, tmp_path: Path, number: signal.Signals) -> None:
    """The workers, which get it too, let the training finish its step and save."""
    run, output = tmp_path / "run", tmp_path / "output.txt"
    assert signal_at_step(arguments(videos, run), run, 2, number, output, to_group=True) == 130, output.read_text()
    step = log(run)[-1]["step"]
    assert f"stopped behind step {step} of 2000, saved as" in output.read_text() and "Error" not in output.read_text()
    assert (run / "checkpoints/last").read_text() == f"step-{step:08d}\n"


def test_workers_end_with_a_killed_training(videos: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert signal_at_step(arguments(videos, run), run, 2, signal.SIGKILL) == -signal.SIGKILL


def fail_in_third_step() -> None:
    """Plant an unexpected error; the traceback keeps the loader alive until the process ends."""
    step = loop.Trainer._train_step

    def fail(self: loop.Trainer, *given: object) -> object:
        if self.step == 2:
            raise AssertionError("planted")
        return step(self, *given)

    loop.Trainer._train_step = fail


def test_unexpected_error_with_workers(videos: Path, tmp_path: Path) -> None:
    """The training process sends its workers SIGTERM and waits for them."""
    code, output = train(arguments(videos, tmp_path / "run"), fault=fail_in_third_step, folder=tmp_path)
    assert code == 1 and "planted" in output, output


def test_two_processes_of_torchrun(videos: Path, tmp_path: Path) -> None:
    """`torchrun` gets SIGTERM, and sends it to the processes of both trainings; both save the same step."""
    run = tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "-m", "fused.train"]
    with open(tmp_path / "output.txt", "w") as file:
        process = subprocess.Popen(
            [*command, *arguments(videos, run)], stdout=file, stderr=file, cwd=ROOT, start_new_session=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        while process.poll() is None and not any(line["step"] >= 2 for line in log(run)):
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)
    output = (tmp_path / "output.txt").read_text()
    step = log(run)[-1]["step"]
    assert f"stopped behind step {step} of 2000" in output, output
    assert (run / "checkpoints/last").read_text() == f"step-{step:08d}\n"
    checkpoint = run / f"checkpoints/step-{step:08d}"
    assert {path.name for path in checkpoint.glob("*.distcp")} == {"__0_0.distcp", "__1_0.distcp"} and tensors(checkpoint)
    assert process.returncode == 1 and not running_in_group(process.pid)


@pytest.fixture
def answered_interrupt() -> Iterator[None]:
    """Let SIGINT raise KeyboardInterrupt; a shell starts its background jobs with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("answered_interrupt")
def test_second_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second one ends the process, unless it comes within the second in which `timeout` sends its own two."""
    now = 100.0
    monkeypatch.setattr(interrupt.time, "monotonic", lambda: now)
    with pytest.raises(KeyboardInterrupt), Interrupt() as requests:
        assert not requests.requested
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        now += 0.5
        signal.raise_signal(signal.SIGINT)
        assert requests.requested
        now += 0.5
        signal.raise_signal(signal.SIGINT)
        pytest.fail("the process goes on")
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
