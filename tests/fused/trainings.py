"""Trainings in a process of their own, as `python -m fused.train` starts them.

The processes are forked from one that has imported PyTorch and nothing has used: each costs milliseconds.
"""

import multiprocessing
import os
import runpy
import signal
import sys
import time
from pathlib import Path

import torch
from videos import write_video

from harness.instruments.two_processes import log

ROOT = Path(__file__).resolve().parent.parent.parent
SMALL = (
    "data.frames=2 data.size=32 data.workers=0 data.scale=[0.9,1.0] model.depth=2 model.embed_dim=32 batch_size=4 "
    "optim.lr=3e-3 log_every=1 deterministic=true device=cpu"
).split()
PATIENCE = 60  # seconds


def start(*trainings: list[str], sabotage=None, out: Path | None = None):
    """A process that runs one training after another; what it prints goes to `out`."""
    os.environ["PYTHONPATH"] = os.pathsep.join(map(str, (ROOT, Path(__file__).parent)))  # of the process that is forked
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["trainings", "fused.train.loop", "torch._dynamo", "av", "yaml", "safetensors.torch"])
    process = context.Process(target=_child, args=(trainings, sabotage, out))
    process.start()
    return process


def _child(trainings, sabotage, out) -> None:
    if out is not None:
        with open(out, "a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
    multiprocessing.set_start_method("fork", force=True)  # for its workers: it was made by another method than they are
    torch.set_num_threads(1)
    if sabotage is not None:
        sabotage()
    for words in trainings:
        sys.argv = ["fused.train", *words]
        try:
            runpy.run_module("fused.train", run_name="__main__", alter_sys=True)
        except SystemExit as ended:
            sys.stdout.flush()
            if ended.code:
                sys.exit(ended.code)


def train(*trainings: list[str], sabotage=None, folder: Path) -> tuple[int, str]:
    """The exit code of trainings one after another, and what they printed."""
    said = folder / f"said-{time.monotonic_ns()}.txt"
    code = _ended(start(*trainings, sabotage=sabotage, out=said))
    return code, said.read_text()


def _ended(process) -> int:
    """Its exit code; a process that waits for one that is not there is killed."""
    process.join(PATIENCE)
    if process.is_alive():
        process.kill()
        process.join()
    return process.exitcode


def killed_at(words: list[str], run: Path, step: int, number: signal.Signals, out: Path | None = None) -> int:
    """Start a training, send a signal when its log has reached a step, and return the exit code."""
    process = start(words, out=out)
    while process.is_alive() and not any(line.get("step", 0) >= step for line in log(run)):
        time.sleep(0.01)
    os.kill(process.pid, number)
    return _ended(process)


def videos(root: Path, each: int, sides: tuple[int, ...] = (0, 20)) -> Path:
    """A folder of classes: how much of the frame is white at the left and at the right."""
    for side in sides:
        (root / f"side{side}").mkdir(parents=True)
        for i in range(each):
            write_video(root / f"side{side}" / f"{i}.avi", frames=6 + i % 2, width=48, height=32, side=side, step=4 + i)
    return root
