"""The way of a new user by the user guide's commands: train, stop, resume, evaluate 4 x 3 views, predict, write features.

    python tests/new_user.py [--long]       # minutes on a CPU; in CI the short form, in seconds

Videos are generated: 3 classes of 12 for the training, of 4 for the evaluation, among them the one whose class is predicted.
"""

import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from extras import GUIDE
from pages import blocks_of
from safetensors.torch import load_file

from harness.fixtures.video import write

GREYS = {"dark": 50, "grey": 120, "light": 200}
COUNTS = {"train": 12, "val": 4}  # videos of each class
STOP_BEHIND = 3  # steps


@dataclass(frozen=True)
class Form:
    """The sizes of a walk: of videos, model and training."""

    frames: int
    height: int
    width: int
    words: str


SHORT = Form(
    9, 32, 48,
    "data.frames=2 data.size=32 data.workers=0 data.scale=[0.9,1.0] model.depth=2 model.embed_dim=32 batch_size=12 epochs=12 "
    "optim.lr=3e-3 mix.probability=0 log_every=1",
)  # fmt: skip
LONG = Form(
    40, 96, 128,
    "data.frames=4 data.size=64 model.depth=2 model.embed_dim=64 batch_size=12 epochs=20 optim.lr=2e-3 log_every=5",
)  # fmt: skip
Run = Callable[[list[str]], tuple[int, str]]  # a command after `python -m`; its exit code and what it printed


def walk(form: Form, run: Run, run_and_stop: Run) -> dict[str, object]:
    """Do every step in the working folder, and return what came out. `run_and_stop` sends SIGINT behind a few steps."""
    make_videos(form)
    blocks = blocks_of(GUIDE)
    [configuration] = [block for block in blocks if block.language == "yaml"]
    Path("run.yaml").write_text(configuration.text)
    train, evaluate, predict, features = (command_of(blocks, module) for module in ("train", "evaluate", "predict", "features"))
    train += form.words.split()
    code, text = run_and_stop(train)
    assert code == 130, text
    code, text = run(train)
    assert code == 0 and "goes on behind step" in text, text
    code, text = run(evaluate)
    assert code == 0 and f"12 videos, 4 x 3 views of {word_of(form, 'data.frames')} frames" in text, text
    code, prediction = run(predict)
    assert code == 0, prediction
    code, text = run(features)
    assert code == 0, text
    results = json.loads(Path("runs/first/test/results.json").read_text())
    best = prediction.splitlines()[1].split()[1]  # the line behind the file's name: probability and class
    return {"top1": results["top1"], "class": best, "features": len(load_file(features[features.index("--out") + 1]))}


def make_videos(form: Form) -> None:
    """Write the videos: a class is a shade, a video a little lighter or darker and with other noise."""
    for part, count in COUNTS.items():
        for name, grey in GREYS.items():
            folder = Path("videos", part, name)
            folder.mkdir(parents=True)
            for i in range(count):
                noise = torch.randint(-20, 21, (form.frames, form.height, form.width, 3))
                write(folder / f"{i}.mp4", (noise + grey + 2 * i).clamp(0, 255).to(torch.uint8))


def command_of(blocks: list, module: str) -> list[str]:
    """Return the guide's first command of `fused.MODULE` that does its work, as words after `python -m`."""
    lines = [line.partition(" #")[0] for block in blocks if block.language == "" for line in block.text.splitlines()]
    asking = ("--print-config", "--dry-run", "--recipes")
    found = [line for line in lines if line.startswith(f"python -m fused.{module} ")]
    return shlex.split(next(line for line in found if not any(word in line for word in asking)))[2:]


def word_of(form: Form, key: str) -> str:
    """Return the value of `key` among a form's words."""
    return dict(word.split("=") for word in form.words.split())[key]


def run_here(words: list[str]) -> tuple[int, str]:
    """Run a command, showing it and what it prints."""
    return _start(words, stop=False)


def run_and_interrupt(words: list[str]) -> tuple[int, str]:
    """Run a training, and press Ctrl-C behind a few steps."""
    return _start(words, stop=True)


def _start(words: list[str], stop: bool) -> tuple[int, str]:
    print(">", shlex.join(["python", "-m", *words]), flush=True)
    process = subprocess.Popen(
        [sys.executable, "-m", *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )  # fmt: skip
    log = Path("runs/first/log.jsonl")
    while stop and process.poll() is None:
        if log.exists() and log.read_text().count('"loss"') >= STOP_BEHIND:
            process.send_signal(signal.SIGINT)
            break
        time.sleep(0.2)
    text = process.communicate()[0]
    print(text, flush=True)
    return process.returncode, text


if __name__ == "__main__":
    root = Path(__file__).resolve().parent.parent
    os.environ["PYTHONPATH"] = str(root)
    os.chdir(tempfile.mkdtemp())
    print(walk(LONG if "--long" in sys.argv else SHORT, run_here, run_and_interrupt))
