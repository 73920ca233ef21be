"""A killed training resumes bit for bit, EMA and best model too; a checkpoint that cannot be written leaves the last one."""

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from trainings import SMALL, class_folders, signal_at_step, small_disk, train

from fused.train import evaluation
from harness.instruments.two_processes import log, steps, tensors

STEPS, EVERY = 8, 3
ARGUMENTS = [*SMALL, "task=finetune", f"steps={STEPS}", "model.drop_path_rate=0.3", "ema=0.6"]
ARGUMENTS += [f"save_every={EVERY}", "evaluate_every=4"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of videos, one of them broken, and of an uninterrupted run with 3 steps an epoch."""
    folder = tmp_path_factory.mktemp("training")
    class_folders(folder / "videos", 7)
    (folder / "videos" / "side0" / "0.avi").write_bytes(b"no video")
    code, output = train(arguments(folder, "uninterrupted"), folder=folder)
    assert code == 0, output
    return folder


def arguments(folder: Path, run: str) -> list[str]:
    return [*ARGUMENTS, f"data.train={folder / 'videos'}", f"data.val={folder / 'videos'}", f"out={folder / run}"]


def assert_same(folder: Path, run: str) -> None:
    """Assert that log, last checkpoint and models equal those of the uninterrupted run."""
    expected, run = folder / "uninterrupted", folder / run
    assert log(run) == log(expected) and [line["step"] for line in steps(run)] == list(range(1, STEPS + 1))
    last = f"checkpoints/step-{STEPS:08d}"
    ours, theirs = tensors(run / last), tensors(expected / last)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert {name.partition(".")[0] for name in ours} == {"model", "optimizer", "ema"}
    for file in ("model/model.safetensors", "model-ema/model.safetensors", "best/model.safetensors", "best/best.json"):
        assert (run / file).read_bytes() == (expected / file).read_bytes(), file
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["last", "step-00000006", "step-00000008"]


def test_interrupted_killed_and_resumed(folder: Path) -> None:
    """Ctrl-C, then kill -9, then to the end with a worker process."""
    run, output = folder / "stopped", folder / "ctrl-c.txt"
    assert signal_at_step(arguments(folder, "stopped"), run, 2, signal.SIGINT, output) == 130
    stopped = steps(run)[-1]["step"]
    assert f"stopped behind step {stopped} of {STEPS}, saved as" in output.read_text()
    assert (run / "checkpoints/last").read_text() == f"step-{stopped:08d}\n"
    assert signal_at_step(arguments(folder, "stopped"), run, max(stopped, EVERY) + 1, signal.SIGKILL) == -signal.SIGKILL
    code, output = train([*arguments(folder, "stopped"), "data.workers=1"], folder=folder)
    assert code == 0 and "goes on behind step" in output and "data.workers: 0 -> 1" in output, output
    assert "1 of 14 files could not be read" in output
    assert_same(folder, "stopped")


def interrupt_evaluation() -> None:
    """Interrupt the training when its first evaluation begins."""
    begin = evaluation.batches

    def interrupt(*given: Any, **more: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return begin(*given, **more)

    evaluation.batches = interrupt


@pytest.mark.parametrize("every", [4, STEPS])
def test_interrupted_in_an_evaluation(folder: Path, every: int) -> None:
    """The training saves without finishing the evaluation, and begins with it when it is resumed, also after the last step."""
    run = f"evaluated-{every}"
    words = [*arguments(folder, run), f"evaluate_every={every}"]
    code, output = train(words, fault=interrupt_evaluation, folder=folder)
    assert code == 130 and f"stopped behind step {every} of {STEPS}" in output, output
    assert not any("val_top1" in line for line in log(folder / run)) and not (folder / run / "model").exists()
    code, output = train(words, folder=folder)
    evaluated = [line["step"] for line in log(folder / run) if "val_top1" in line]
    assert code == 0 and evaluated == list(range(every, STEPS + 1, every)), output
    if every == 4:  # as in the uninterrupted run
        assert_same(folder, run)


def die_before_metadata() -> None:
    """Kill the process in the second checkpoint, after its tensors are written and before their metadata is."""
    from torch.distributed.checkpoint import FileSystemWriter

    finish = FileSystemWriter.finish

    def die(self, *arguments: Any, **more: Any) -> None:
        if "step-00000006" in str(self.path):
            os.kill(os.getpid(), signal.SIGKILL)
        return finish(self, *arguments, **more)

    FileSystemWriter.finish = die


def die_before_pointer() -> None:
    """Kill the process when the second checkpoint is complete and `last` does not name it yet."""
    replace = os.replace

    def die(source: Path, target: Path) -> None:
        if Path(target).name == "last" and Path(target).exists():
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)

    os.replace = die


def die_before_the_last_name() -> None:
    """Kill the process when the second checkpoint is written, and still has a draft's name."""
    replace = os.replace

    def die(source: Path, target: Path) -> None:
        if Path(target).name == "step-00000006":
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)

    os.replace = die


@pytest.mark.parametrize("fault", [die_before_metadata, die_before_the_last_name, die_before_pointer])
def test_killed_while_a_checkpoint_is_written(folder: Path, fault: Callable[[], None]) -> None:
    run = fault.__name__
    code, _ = train(arguments(folder, run), fault=fault, folder=folder)
    place = folder / run / "checkpoints"
    assert code == -signal.SIGKILL and (place / "last").read_text() == "step-00000003\n"
    assert all((path / "training.json").is_file() for path in place.glob("step-*"))  # an incomplete one has a draft's name
    code, output = train(arguments(folder, run), folder=folder)
    assert code == 0 and "goes on behind step 3" in output, output
    assert_same(folder, run)


def test_full_disk(folder: Path) -> None:
    run = folder / "full"
    words = [*arguments(folder, "full"), "data.val=null"]
    code, output = train([*words, "steps=3"], folder=folder)
    assert code == 0, output
    before = tensors(run / "checkpoints/step-00000003")
    code, output = train(words, fault=small_disk, folder=folder)
    assert code == 1 and "Traceback" not in output, output
    assert "step-00000006: not written, the checkpoint before it stays" in output, output
    assert "MiB are free there): OSError" in output, output
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["last", "step-00000003"]
    assert all(torch.equal(value, before[name]) for name, value in tensors(run / "checkpoints/step-00000003").items())


def test_damaged_checkpoint(folder: Path) -> None:
    run = folder / "damaged"
    shutil.copytree(folder / "uninterrupted", run)
    data = run / "checkpoints/step-00000008/__0_0.distcp"
    data.write_bytes(data.read_bytes()[:1000])
    code, output = train(arguments(folder, "damaged"), folder=folder)
    assert code == 2 and "step-00000008 cannot be read" in output, output
    shutil.rmtree(run / "checkpoints/step-00000008")
    code, output = train(arguments(folder, "damaged"), folder=folder)
    assert code == 2 and "names step-00000008, which is not there" in output, output
    (run / "checkpoints/last").write_text("step-00000006\n")
    code, output = train(arguments(folder, "damaged"), folder=folder)
    assert code == 0, output
    assert_same(folder, "damaged")
