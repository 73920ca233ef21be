"""The commands in processes of their own: two of them together, and the way of a new user from videos to a prediction."""

import json
import signal
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn
from trainings import run_two, signal_at_step, train
from videos import write_video

from fused import VideoMamba, VideoMambaConfig
from fused.evaluate import Settings, evaluate
from fused.features import extract

SIDES = {"narrow": 0, "middle": 12, "wide": 24}  # white columns at the left and right of a frame
VIDEOS = 12  # of a class


def videos(root: Path, count: int = VIDEOS) -> Path:
    for name, side in SIDES.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            write_video(root / name / f"{i}.avi", frames=6 + i % 3, width=72, height=32, side=side, step=4 + i)
    return root


def test_two_processes(tmp_path: Path) -> None:
    """Each video is read once, a file that cannot be read is named once, and one process writes."""
    data = videos(tmp_path / "data", 3)
    (data / "wide/broken.avi").write_bytes(b"no video")
    torch.manual_seed(0)
    model = VideoMamba(VideoMambaConfig(depth=1, embed_dim=32, img_size=32, num_frames=2, num_classes=3))
    nn.init.normal_(model.head.weight)
    model.labels = tuple(SIDES)
    folder, out = model.save_pretrained(tmp_path / "model"), tmp_path / "out"
    words = ["--model", str(folder), "--data", str(data), "--crops", "3", "workers=0", "device=cpu", "--out"]
    text = run_two("fused.evaluate", [*words, str(out)], tmp_path)
    assert text.count("top-1") == 1 + ("; top-1" in text) and text.count("left out") == 1, text
    results = evaluate(folder, data, settings=Settings(crops=3, workers=0))
    assert json.loads((out / "results.json").read_text()) == results.numbers and results.numbers["read"] == 9
    lines = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    assert [line["video"] for line in lines] == [line["video"] for line in results.lines]
    store = tmp_path / "features.npy"
    assert run_two("fused.features", [*words, str(store)], tmp_path).count("9 features") == 1
    due = extract(VideoMamba.from_pretrained(folder), data, Settings(crops=3, workers=0))
    assert json.loads((tmp_path / "features.npy.json").read_text()) == due.names
    assert np.allclose(np.load(store), torch.stack(due.values), rtol=0, atol=1e-5)


def test_new_user(tmp_path: Path) -> None:
    """Train, stop, resume, evaluate with 4 x 3 views, name a new file, write features: each is one command."""
    data, run = videos(tmp_path / "videos"), tmp_path / "run"
    words = [
        "task=finetune", f"out={run}", f"data.train={data}", "data.frames=2", "data.size=32", "data.workers=0",
        "data.scale=[0.9,1.0]", "model.depth=2", "model.embed_dim=32", "batch_size=12", "optim.lr=3e-3", "steps=60",
        "log_every=1", "mix.probability=0", "device=cpu",
    ]  # fmt: skip
    assert signal_at_step(words, run, 3, signal.SIGINT) == 130
    code, text = train(words, folder=tmp_path)
    assert code == 0 and "goes on behind step" in text
    command = ["--model", str(run / "model"), "--data", str(data), "--out", str(run / "test"), "--views", "4", "--crops", "3"]
    code, text = train([*command, "workers=1"], folder=tmp_path, module="fused.evaluate")
    assert code == 0 and "36 videos, 4 x 3 views of 2 frames at 32 pixels" in text
    assert json.loads((run / "test/results.json").read_text())["top1"] > 0.9, text
    new = write_video(tmp_path / "new.avi", frames=9, width=72, height=32, side=24, step=9)
    code, text = train(["--model", str(run / "model"), str(new)], folder=tmp_path, module="fused.predict")
    assert code == 0 and text.splitlines()[1].split()[1] == "wide", text
    store = tmp_path / "features.safetensors"
    command = ["--model", str(run / "model"), "--data", str(data), "--out", str(store), "workers=0"]
    code, text = train(command, folder=tmp_path, module="fused.features")
    assert code == 0 and len(load_file(store)) == 36, text
