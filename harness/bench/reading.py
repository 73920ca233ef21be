"""The timed call that reads a clip from a video file, on one thread."""

import torch

from harness.bench.clock import Call
from harness.fixtures.encoded_film import encoded_film
from harness.judge.registry import subjects
from harness.records.speed import Entry, Point


def make(point: Point, entry: Entry, device: str) -> Call:
    """Return the call that reads a clip of point["T"] frames from the film with a key frame every point["G"] frames."""
    torch.set_num_threads(1)  # PyTorch's resizing and our decoder take as many
    reader = next(i for i in subjects()[entry.subject].implementations() if i.name == entry.implementation)
    path, frames = encoded_film(point["G"]), point["T"]
    return Call(lambda: reader.call(path, frames), cpu_time=True)
