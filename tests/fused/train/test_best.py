"""The best model by validation: which it is, that it stays, what it holds, and that it cannot be written."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from trainings import SMALL, class_folders, small_disk, train

from fused import VideoMamba
from fused.train import validation
from harness.instruments.two_processes import log, tensors


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return the arguments of a training of four steps that is evaluated and saved at each, without its folder."""
    videos = class_folders(tmp_path_factory.mktemp("best") / "videos", 4)
    parts = [f"data.{part}={videos}" for part in ("train", "val")]
    return [*SMALL, "task=finetune", "steps=4", "evaluate_every=1", "save_every=1", "keep=9", "ema=0.5", *parts]


def plant(accuracies: list[tuple[float, float]]) -> None:
    """Make evaluations, one after another, give these accuracies of the model and of its EMA, of all listed videos."""
    compute, remaining = validation.evaluate, iter(accuracies)

    def evaluate(*given: Any) -> Any:
        evaluation = compute(*given)
        evaluation.results["val_top1_all"], evaluation.results["val_ema_top1_all"] = next(remaining)
        return evaluation

    validation.evaluate = evaluate


def planted(*accuracies: tuple[float, float]) -> Callable[[], None]:
    return partial(plant, list(accuracies))


def assert_best(run: Path, step: int, weights: str, top1: float, val: str) -> None:
    """Assert that the best model is that of a checkpoint."""
    expected = {"step": step, "weights": weights, "top1": top1, "val": val}
    assert json.loads((run / "best/best.json").read_text()) == expected
    checkpoint, model = tensors(run / f"checkpoints/step-{step:08d}"), load_file(run / "best/model.safetensors")
    assert all(torch.equal(value, checkpoint[f"{weights}.{name}"]) for name, value in model.items())
    assert VideoMamba.from_pretrained(run / "best").config.num_classes == 2


def test_highest_and_first(words: list[str], tmp_path: Path) -> None:
    """It survives resuming; a higher accuracy replaces it, an equal one does not."""
    run, val = tmp_path / "run", words[-1].partition("=")[2]
    words = [*words, f"out={run}"]
    accuracies = planted((0.25, 0.0), (0.75, 0.75), (0.75, 0.75), (0.5, 0.0))
    code, output = train(words, fault=accuracies, folder=tmp_path)
    assert code == 0 and output.count("best so far") == 2, output
    assert f"step 2: best so far, top-1 75.00%, saved as {run / 'best'}" in output
    assert_best(run, 2, "model", 0.75, val)
    code, output = train([*words, "steps=5"], fault=planted((0.75, 0.75)), folder=tmp_path)
    assert code == 0 and "best so far" not in output, output
    assert_best(run, 2, "model", 0.75, val)
    code, output = train([*words, "steps=7"], fault=planted((0.5, 0.875), (0.5, 0.75)), folder=tmp_path)
    assert code == 0 and f"step 6: best so far, the EMA's top-1 87.50%, saved as {run / 'best'}" in output, output
    assert_best(run, 6, "ema", 0.875, val)


def test_keep_does_not_delete_it(words: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    code, output = train([*words, "keep=1", f"out={run}"], fault=planted((1, 0), (0, 0), (0, 0), (0, 0)), folder=tmp_path)
    assert code == 0 and json.loads((run / "best/best.json").read_text())["step"] == 1, output
    assert VideoMamba.from_pretrained(run / "best") and not (run / "checkpoints/step-00000001").exists()


def test_other_validation_videos(words: list[str], tmp_path: Path) -> None:
    """Accuracies on other videos are no competitors; nor are those of another run in the same folder."""
    run, other = tmp_path / "run", class_folders(tmp_path / "other", 1)
    words = [*words, f"out={run}"]
    code, output = train([*words, "steps=1"], fault=planted((0.75, 0.0)), folder=tmp_path)
    assert code == 0, output
    code, output = train([*words, "steps=2", f"data.val={other}"], fault=planted((0.0, 0.0), (0.25, 0.0)), folder=tmp_path)
    assert code == 0 and json.loads((run / "best/best.json").read_text())["step"] == 2, output
    (run / "checkpoints/last").unlink()  # the run begins anew
    code, output = train([*words, "steps=1", f"data.val={other}"], fault=planted((0.0, 0.0)), folder=tmp_path)
    assert code == 0 and json.loads((run / "best/best.json").read_text())["top1"] == 0, output


def test_run_that_is_done_is_evaluated_on_other_videos(words: list[str], tmp_path: Path) -> None:
    run, other = tmp_path / "run", class_folders(tmp_path / "other", 1)
    words = [*words, "steps=1", f"out={run}"]
    for val, top1 in ((None, 0.75), (other, 0.25)):
        more = [] if val is None else [f"data.val={val}"]
        code, output = train([*words, *more], fault=planted((top1, 0.0)), folder=tmp_path)
        assert code == 0 and output.count("step 1: best so far") == 1, output
        code, output = train([*words, *more], fault=planted(), folder=tmp_path)  # the evaluation is in the log
        assert code == 0 and "best so far" not in output, output
    assert_best(run, 1, "model", 0.25, str(other))
    assert [line["val"] for line in log(run) if "val_top1" in line] == [words[-3].partition("=")[2], str(other)]


def test_without_validation_there_is_none(words: list[str], tmp_path: Path) -> None:
    code, output = train([*words, "steps=1", "data.val=null", f"out={tmp_path / 'run'}"], folder=tmp_path)
    assert code == 0 and not (tmp_path / "run/best").exists() and "best" not in output, output


def test_damaged_record(words: list[str], tmp_path: Path) -> None:
    words = [*words, f"out={tmp_path / 'run'}"]
    code, output = train([*words, "steps=1"], folder=tmp_path)
    assert code == 0, output
    for text in ("", "{}", "[1]"):
        (tmp_path / "run/best/best.json").write_text(text)
        code, output = train([*words, "steps=2"], folder=tmp_path)
        assert code == 2 and "best.json cannot be read" in output and "Traceback" not in output, output


def test_full_disk(words: list[str], tmp_path: Path) -> None:
    """The training ends, and goes on from the checkpoint before."""
    run = tmp_path / "run"
    code, output = train([*words, "steps=1", f"out={run}"], folder=tmp_path)
    assert code == 0, output
    (run / "best/best.json").unlink()
    code, output = train([*words, f"out={run}"], fault=small_disk, folder=tmp_path)
    assert code == 1 and "best/model.safetensors: not written" in output and "Traceback" not in output, output
    assert (run / "checkpoints/last").read_text() == "step-00000001\n"
    code, output = train([*words, f"out={run}"], folder=tmp_path)
    assert code == 0 and "goes on behind step 1" in output and (run / "best/best.json").is_file(), output
