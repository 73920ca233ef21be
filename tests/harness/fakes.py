"""Entries with known answers for the tests of the timing: they run in a worker process."""

import itertools
import os
import time
import weakref
from pathlib import Path

import torch

from harness.bench.clock import Call

ROOM = 1000  # tokens that `greedy` has room for


def sleeper(point, entry, device):
    """Sleeps a millisecond a token."""
    return Call(lambda: time.sleep(1e-3 * point["L"]))


def greedy(point, entry, device):
    """Runs out of memory beyond ROOM tokens."""
    if point["L"] > ROOM:
        raise torch.OutOfMemoryError(f"no room for {point['L']} tokens")
    return Call(lambda: time.sleep(1e-4))


def raiser(point, entry, device):
    """Raises an error of so many characters."""
    raise RuntimeError({17: "shapes do not fit", 25: "CUDA error: out of memory"}[point["L"]])


def mortal(point, entry, device):
    """Takes its process with it beyond 5 tokens."""

    def run():
        if point["L"] > 5:
            os._exit(11)

    return Call(run)


def hungry(point, entry, device):
    """Touches a mebibyte a token."""
    return Call(lambda: bytearray(point["L"] * 2**20).count(1))


def sharer(point, entry, device):
    """Has room only while no other of its kind is loaded: each leaves a file in the folder that its variant names."""
    folder = Path(entry.variant)
    if list(folder.iterdir()):
        raise torch.OutOfMemoryError("another is here")
    (folder / str(os.getpid())).touch()
    call = Call(lambda: time.sleep(1e-3))
    weakref.finalize(call, (folder / str(os.getpid())).unlink)
    return call


def dawdler(point, entry, device):
    """Says that it takes 11 seconds beyond 2 tokens: its clock is not the wall's."""
    if point["L"] > 2:
        time.perf_counter = iter(range(0, 10**6, 11)).__next__
    return Call(lambda: None)


def looper(point, entry, device):
    """Takes a millisecond a token in a window of four calls. The host took long in its first turn."""
    answers = itertools.chain([(9.0, 9.5)] * 2, itertools.repeat((0.25, 0.5)))
    return Call(lambda: time.sleep(1e-3 * point["L"]), window=4, host=lambda: next(answers))
