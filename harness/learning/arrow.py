"""Is the video shown forwards or backwards? The shipped clip: learnt on its first part, tested on its last.

Five seconds of one film are no data set. How much carries over to other shots of the same film is measured, without a bar.
"""

import functools

import torch
from torch import Tensor

from fused.io.video import count_frames, read_clip
from harness.fixtures.video import SHIPPED
from harness.learning.task import Batch, Data, Recipe, Task

SIDE, FRAMES, STRIDE = 32, 6, 2  # every second frame
TRAIN_END, HELD_OUT_START = 0.6, 0.7  # shares of the video's time
SPAN = (FRAMES - 1) * STRIDE + 1


@functools.cache
def frames() -> Tensor:
    """Return every frame of the shipped clip, (3, 132, SIDE, SIDE)."""
    return read_clip(SHIPPED, count_frames(SHIPPED), SIDE)


def clips_at(film: Tensor, starts: Tensor, backwards: Tensor) -> Tensor:
    """Return clips (B, 3, FRAMES, SIDE, SIDE) that begin at the frames `starts` (B,); where `backwards` (B,), in reverse."""
    places = starts[:, None] + STRIDE * torch.arange(FRAMES)
    places = torch.where(backwards[:, None], places.flip(1), places)
    return film[:, places].transpose(0, 1)


def data() -> Data:
    """Return clips that are mirrored at random for training; held out is every clip of the last part, both ways."""
    film = frames()
    last = round(TRAIN_END * film.shape[1]) - SPAN
    begins = torch.arange(round(HELD_OUT_START * film.shape[1]), film.shape[1] - SPAN + 1).repeat(2)
    reverse = torch.arange(len(begins)) < len(begins) // 2

    def draw(generator: torch.Generator, count: int) -> Batch:
        starts = torch.randint(last + 1, (count,), generator=generator)
        backwards, mirrored = (torch.rand(2, count, generator=generator) < 0.5).unbind()
        clips = clips_at(film, starts, backwards)
        return torch.where(mirrored[:, None, None, None, None], clips.flip(-1), clips), backwards.long()

    return Data(draw, (clips_at(film, begins, reverse), reverse.long()))


TASK = Task(
    "arrow",
    "time's arrow on the shipped clip",
    {"img_size": SIDE, "patch_size": 16, "channels": 3, "num_frames": FRAMES, "num_classes": 2, "embed_dim": 32, "depth": 2,
     "drop_path_rate": 0.0, "scan_order": "temporal", "ssm_cfg": {"d_state": 8}},
    data,
    full=Recipe(steps=300, batch=32, lr=5e-3, bar=None),
    short=Recipe(steps=10, batch=16, lr=5e-3, bar=None),
)  # fmt: skip
