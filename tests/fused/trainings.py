"""Run trainings in processes of their own, as `python -m fused.train` does, and other modules of `fused` likewise.

The processes are forked from one that has imported PyTorch and not used it: each starts in milliseconds.
"""

import contextlib
import multiprocessing
import os
import resource
import runpy
import signal
import socket
import sys
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import torch
from videos import write_video

from harness.instruments.two_processes import log

ROOT = Path(__file__).resolve().parent.parent.parent
SMALL = (
    "data.frames=2 data.size=32 data.workers=0 data.scale=[0.9,1.0] model.depth=2 model.embed_dim=32 batch_size=4 "
    "optim.lr=3e-3 log_every=1 deterministic=true device=cpu"
).split()
TIMEOUT = 60  # seconds
WORKERS_TIMEOUT = 5  # seconds after the end of their training

Fault = Callable[[], None]  # called in the process before the training


def start(
    *trainings: list[str], fault: Fault | None = None, output: Path | None = None, module: str = "fused.train"
) -> ForkServerProcess:
    """Start a process that runs one training, or other `module`, after another; what it prints is appended to `output`."""
    os.environ["PYTHONPATH"] = os.pathsep.join(map(str, (ROOT, Path(__file__).parent)))  # of the process that is forked
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["trainings", "fused.train.loop", "torch._dynamo", "av", "yaml", "safetensors.torch"])
    process = context.Process(target=_run, args=(trainings, fault, output, module))
    process.start()
    return process


def _run(trainings: tuple[list[str], ...], fault: Fault | None, output: Path | None, module: str) -> None:
    if output is not None:
        with open(output, "a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
    multiprocessing.set_start_method("fork", force=True)  # for data-loading workers; this process was made by forkserver
    torch.set_num_threads(1)
    if fault is not None:
        fault()
    for arguments in trainings:
        sys.argv = [module, *arguments]
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as exit_:
            sys.stdout.flush()
            if exit_.code:
                sys.exit(exit_.code)


def set_environment(values: dict[str, str]) -> None:
    """Set environment variables, as the `fault` of a process."""
    os.environ.update(values)


def small_disk() -> None:
    """Let no file grow beyond 50 kB, as the `fault` of a process."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))


def train(
    *trainings: list[str], fault: Fault | None = None, folder: Path, module: str = "fused.train"
) -> tuple[int, str]:
    """Return the exit code of trainings that run one after another, and what they printed."""
    output = folder / f"output-{time.monotonic_ns()}.txt"
    code = _join(start(*trainings, fault=fault, output=output, module=module))
    return code, output.read_text()


def run_two(module: str, words: list[str], folder: Path) -> str:
    """Run a command in two processes, as torchrun does, and return what they print. Both have to end well."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes, output = [], folder / f"{module}.txt"
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for rank in ("0", "1"):
        ranked = partial(set_environment, world | {"RANK": rank, "LOCAL_RANK": rank})
        processes.append(start(words, fault=ranked, output=output, module=module))
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0], output.read_text()
    return output.read_text()


def _join(process: ForkServerProcess) -> int:
    """Return the exit code of a process; one that has not ended after TIMEOUT is killed."""
    process.join(TIMEOUT)
    if process.is_alive():
        process.kill()
        process.join()
    assert process.exitcode is not None
    return process.exitcode


def signal_at_step(
    arguments: list[str], run: Path, step: int, number: signal.Signals, output: Path | None = None, to_group: bool = False
) -> int:
    """Start a training, send it a signal when its log has reached a step, and return the exit code.

    With `to_group` its workers get the signal too, as from a terminal or a scheduler, and every process has to end.
    """
    process = start(arguments, fault=os.setsid, output=output)  # the leader of a process group of its own
    while process.is_alive() and not any(line.get("step", 0) >= step for line in log(run)):
        time.sleep(0.01)
    assert process.pid is not None
    (os.killpg if to_group else os.kill)(process.pid, number)
    code, end = _join(process), time.monotonic() + WORKERS_TIMEOUT
    while remaining := running_in_group(process.pid):
        assert time.monotonic() < end, f"the processes {remaining} did not end with their training"
        time.sleep(0.01)
    return code


def running_in_group(group: int) -> list[int]:
    """Return the processes of a process group that have not ended."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended since
            state, _, its_group = path.read_text().rpartition(")")[2].split()[:3]
            if int(its_group) == group and state != "Z":
                found.append(int(path.parent.name))
    return found


def class_folders(root: Path, videos_per_class: int, sides: tuple[int, ...] = (0, 20)) -> Path:
    """Make a folder of two classes, which differ in the number of white columns at the left and right; return `root`."""
    for side in sides:
        (root / f"side{side}").mkdir(parents=True)
        for i in range(videos_per_class):
            write_video(root / f"side{side}" / f"{i}.avi", frames=6 + i % 2, width=48, height=32, side=side, step=4 + i)
    return root
