"""What the check `processes` does not ask of two processes: their evaluation, who writes, and going on with one."""

import shutil

import pytest
from trainings import SMALL, train, videos

from harness.instruments.two_processes import Training, log, trained

VIDEOS = 8


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_one_process_goes_on_where_two_stopped(tmp_path, parallel):
    """With their parameters, bit for bit; each video is evaluated once, and one of the two writes."""
    source = videos(tmp_path / "videos", VIDEOS // 2)
    words = [*SMALL, "task=finetune", "steps=2", f"data.train={source}", f"data.val={source}", f"out={tmp_path / 'run'}"]
    said = trained([Training((*words, f"parallel={parallel}"), together=True)], tmp_path)
    assert said.count("2 processes") == said.count("done: ") == 1, said
    assert [line["step"] for line in log(tmp_path / "run")] == [1, 2, 2]
    assert log(tmp_path / "run")[-1]["val_videos"] == VIDEOS
    model = tmp_path / "run/model/model.safetensors"
    before = model.read_bytes()
    shutil.rmtree(model.parent)
    code, said = train(words, folder=tmp_path)
    assert code == 0 and "processes: 2 -> 1" in said, said
    assert model.read_bytes() == before
