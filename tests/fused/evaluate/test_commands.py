"""The commands in processes of their own, two of them together."""

import json
from pathlib import Path

import numpy as np
import torch
from torch import nn
from trainings import run_two
from videos import write_video

from fused import VideoMamba, VideoMambaConfig
from fused.evaluate import Settings, evaluate
from fused.features import extract

SIDES = {"narrow": 0, "middle": 12, "wide": 24}  # white columns at the left and right of a frame


def videos(root: Path, count: int) -> Path:
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
