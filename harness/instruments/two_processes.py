"""Trainings by the command of `fused.train` in two processes: each by itself, or both together as torchrun starts them.

The processes are forked from one that has imported PyTorch and used nothing of it: in each, CUDA starts afresh, and only the
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

TIMEOUT = 240.0  # seconds for all trainings before the processes count as stuck
SHOWN_CHARACTERS = 450  # of the output, in an error
MEASURED = ("clips_per_s", "memory_mib", "data_wait")  # fields of a log that another run need not repeat
PRELOADED = (
    "harness.cli.app", "harness.instruments.two_processes", "fused.train.__main__",
    "torch._dynamo", "av", "yaml", "safetensors.torch",
)  # fmt: skip


@dataclass(frozen=True)
class Training:
    """A command line of `python -m fused.train`; `in_two_processes`: by two together; `exact`: its model in float64."""

    words: tuple[str, ...]
    in_two_processes: bool = False
    exact: bool = False


def run_trainings(trainings: Sequence[Training], folder: Path, plant: Callable[[], None] | None = None) -> str:
    """Run trainings one after another, those that need one process spread over both; return their output.

    `plant` is called in each process first. Raises RuntimeError that shows the end of the output if a process fails,
    or if they have not ended after TIMEOUT.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    output = folder / f"output-{time.monotonic_ns()}.txt"
    output.touch()
    ends, threads = context.Pipe(), torch.get_num_threads()
    processes = [
        context.Process(target=_child, args=(tuple(trainings), rank, ends[rank], threads, output, plant)) for rank in range(2)
    ]
    try:
        for process in processes:
            process.start()
        end = time.monotonic() + TIMEOUT
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
        end_of_output = output.read_text()[-SHOWN_CHARACTERS:].strip()
        raise RuntimeError(f"two processes of fused.train: {how}; the end of their output: {end_of_output}")
    return output.read_text()


def _child(
    trainings: tuple[Training, ...], rank: int, other: Connection, threads: int, output: Path, plant: Callable[[], None] | None
) -> None:
    with open(output, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    workers.follow(os.getppid())
    torch.set_num_threads(threads)
    from fused.train.__main__ import main

    destroy, kept = dist.destroy_process_group, list[Any]()

    def destroy_and_keep(group: dist.ProcessGroup | None = None) -> None:
        kept.append(dist.group.WORLD)  # a process hung once behind a training, it seems in freeing the group of gloo's threads
        destroy(group)

    if plant is not None:
        plant()
    dist.destroy_process_group = destroy_and_keep  # type: ignore[assignment]
    for i, training in enumerate(trainings):
        if training.in_two_processes:
            os.environ |= _rendezvous(rank, other, kept)
        elif i % 2 != rank:
            continue
        with in_float64() if training.exact else contextlib.nullcontext():
            code = main(training.words)
        for name in _RENDEZVOUS:
            os.environ.pop(name, None)
        if code:
            sys.exit(code)


_RENDEZVOUS = (
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE",
    "TORCHELASTIC_RESTART_COUNT",
)  # fmt: skip


def _rendezvous(rank: int, other: Connection, kept: list[Any]) -> dict[str, str]:
    """Return the environment that torchrun sets.

    Each training has a store of its own: a process that is early must not find the last one. As torchrun's, the store listens
    before its port is sent, and is `kept`: a port that is only known to be free may be taken by then.
    """
    host = "127.0.0.1"
    if rank == 0:
        store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False)
        kept.append(store)
        port = store.port
        other.send(port)
    else:
        port = other.recv()
    return dict(zip(_RENDEZVOUS, map(str, (rank, rank, 2, host, port, True, 0)), strict=True))


@contextlib.contextmanager
def in_float64() -> Iterator[None]:
    """Make trainings compute in float64, from the same inputs to the last bit, for the time within."""
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
    """Return the complete lines of a run's log so far, without what was measured of the machine."""
    if not (run / "log.jsonl").is_file():
        return []
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines(keepends=True) if line.endswith("\n")]
    return [{key: value for key, value in line.items() if key not in MEASURED} for line in lines]


def steps(run: Path) -> list[dict[str, Any]]:
    """Return the lines of a log that are of steps."""
    return [line for line in log(run) if "loss" in line]


def tensors(checkpoint: Path) -> dict[str, Tensor]:
    """Return all tensors of a checkpoint by name, unsharded and on the CPU."""
    metadata: Any = dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    found = {name: torch.empty(about.size, dtype=about.properties.dtype) for name, about in metadata.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # there is no process group
        dcp.load(found, checkpoint_id=checkpoint, no_dist=True)
    return found
