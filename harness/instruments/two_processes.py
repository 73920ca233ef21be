"""Trainings by the command of `fused.train` in two processes: one of them by itself, or both together as torchrun starts them.

The processes are forked from one that has imported PyTorch and used nothing of it: in each CUDA starts afresh, and only the
first has to wait for imports.
"""

import contextlib
import json
import multiprocessing
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor

from harness.runs import workers

LIMIT = 240.0  # seconds for all trainings before the processes count as stuck
SHOWN = 450  # characters of what they printed that an error shows
MEASURED = ("clips_per_s", "memory_mib")  # of a log, what another run need not repeat
PRELOADED = (
    "harness.cli.app", "harness.instruments.two_processes", "fused.train.__main__",
    "torch._dynamo", "av", "yaml", "safetensors.torch",
)  # fmt: skip


@dataclass(frozen=True)
class Training:
    """A command line of `python -m fused.train`; `together`: as one of two processes; `exact`: its model in float64."""

    words: tuple[str, ...]
    together: bool = False
    exact: bool = False


def trained(trainings: Sequence[Training], folder: Path, plant: Callable[[], None] | None = None) -> str:
    """Train one after another, those that need but one process spread over both; what they printed.

    `plant` is called in each process first. Raises RuntimeError that shows the last of what was printed if a process fails,
    or if they have not ended after LIMIT.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    said = folder / f"said-{time.monotonic_ns()}.txt"
    said.touch()
    ends, threads = context.Pipe(), torch.get_num_threads()
    processes = [
        context.Process(target=_child, args=(tuple(trainings), rank, ends[rank], threads, said, plant)) for rank in range(2)
    ]
    try:
        for process in processes:
            process.start()
        end = time.monotonic() + LIMIT
        while any(p.exitcode is None for p in processes) and not any(p.exitcode for p in processes) and time.monotonic() < end:
            wait([p.sentinel for p in processes if p.exitcode is None], timeout=1)
        codes = [p.exitcode for p in processes]
    finally:  # one that failed leaves the other waiting for it
        for process in processes:
            if process.pid is not None:
                process.kill()
                process.join()
    if codes != [0, 0]:
        how = " and ".join("not ended" if code is None else f"exit code {code}" for code in codes)
        raise RuntimeError(f"two processes of fused.train: {how}; the last they said: {said.read_text()[-SHOWN:].strip()}")
    return said.read_text()


def _child(
    trainings: tuple[Training, ...], rank: int, other: Connection, threads: int, said: Path, plant: Callable[[], None] | None
) -> None:
    with open(said, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    workers.follow(os.getppid())
    torch.set_num_threads(threads)
    from fused.train.__main__ import main

    destroy, kept = dist.destroy_process_group, list[Any]()

    def leave(group: dist.ProcessGroup | None = None) -> None:
        kept.append(dist.group.WORLD)  # a process hung once behind a training, it seems in freeing the group of gloo's threads
        destroy(group)

    if plant is not None:
        plant()
    dist.destroy_process_group = leave  # type: ignore[assignment]
    for i, training in enumerate(trainings):
        if training.together:
            os.environ |= _place(rank, other, kept)
        elif i % 2 != rank:
            continue
        with in_float64() if training.exact else contextlib.nullcontext():
            code = main(training.words)
        for name in _PLACE:
            os.environ.pop(name, None)
        if code:
            sys.exit(code)


_PLACE = (
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE",
    "TORCHELASTIC_RESTART_COUNT",
)  # fmt: skip


def _place(rank: int, other: Connection, kept: list[Any]) -> dict[str, str]:
    """What torchrun sets. The processes meet at another store each time: who comes early must not find the last meeting. As
    torchrun's it listens before its port is told, and is `kept`: a port that is only known to be free may be taken by then."""
    host = "127.0.0.1"
    if rank == 0:
        store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False)
        kept.append(store)
        port = store.port
        other.send(port)
    else:
        port = other.recv()
    return dict(zip(_PLACE, map(str, (rank, rank, 2, host, port, True, 0)), strict=True))


@contextlib.contextmanager
def in_float64() -> Iterator[None]:
    """Within it, what a training's step is given is the same to the last bit, and all that is computed of it is float64."""
    from fused.train import tasks

    build = tasks.build_task

    def built(*arguments: Any) -> Any:
        task: Any = build(*arguments).double()
        prepare = task.prepare
        task.prepare = lambda *given: tuple(x.double() if x.is_floating_point() else x for x in prepare(*given))
        return task

    with mock.patch.object(tasks, "build_task", built):
        yield


def log(run: Path) -> list[dict[str, Any]]:
    """The whole lines of a run's log so far, without what was measured of the machine."""
    if not (run / "log.jsonl").is_file():
        return []
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines(keepends=True) if line.endswith("\n")]
    return [{key: value for key, value in line.items() if key not in MEASURED} for line in lines]


def steps(run: Path) -> list[dict[str, Any]]:
    """The lines of a log that are of steps."""
    return [line for line in log(run) if "loss" in line]


def tensors(checkpoint: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint by name, whole and on the CPU."""
    metadata: Any = dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    found = {name: torch.empty(about.size, dtype=about.properties.dtype) for name, about in metadata.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # there is no process group
        dcp.load(found, checkpoint_id=checkpoint, no_dist=True)
    return found
