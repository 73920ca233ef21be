"""Two processes, beyond the check `processes`: evaluation, writing by rank 0 alone, and resuming with one process."""

import shutil
from pathlib import Path

import pytest
import torch
from trainings import SMALL, class_folders, train

from harness.instruments.two_processes import Training, log, run_trainings, tensors

VIDEOS = 8


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_one_process_resumes_a_run_of_two(tmp_path: Path, parallel: str) -> None:
    """The parameters are the same bits; each video is evaluated once, and one of the two processes writes."""
    source = class_folders(tmp_path / "videos", VIDEOS // 2)
    words = [*SMALL, "task=finetune", "steps=2", f"data.train={source}", f"data.val={source}", f"out={tmp_path / 'run'}"]
    output = run_trainings([Training((*words, f"parallel={parallel}"), in_two_processes=True)], tmp_path)
    assert output.count("2 processes") == output.count("done: ") == 1, output
    assert [line["step"] for line in log(tmp_path / "run")] == [1, 2, 2]
    assert log(tmp_path / "run")[-1]["val_read"] == VIDEOS
    model = tmp_path / "run/model/model.safetensors"
    before = model.read_bytes()
    shutil.rmtree(model.parent)
    code, output = train(words, folder=tmp_path)
    assert code == 0 and "processes: 2 -> 1" in output, output
    assert model.read_bytes() == before


def test_evaluation_before_a_sharded_checkpoint(tmp_path: Path) -> None:
    """The checkpoint has the same tensors as without the evaluation, the optimiser's of every parameter among them."""
    source = class_folders(tmp_path / "videos", VIDEOS // 2)
    words = [*SMALL, "task=finetune", "steps=1", f"data.train={source}", "parallel=fsdp"]
    runs = {"evaluated": [f"data.val={source}"], "plain": []}
    run_trainings([Training((*words, f"out={tmp_path / run}", *more), True) for run, more in runs.items()], tmp_path)
    evaluated, plain = (tensors(tmp_path / run / "checkpoints/step-00000001") for run in runs)
    assert evaluated.keys() == plain.keys() and all(torch.equal(evaluated[name], plain[name]) for name in plain)
