"""Is the video shown forwards or backwards? The shipped clip: learnt on its first part, asked on its last.

Five seconds of one film are no data set; how much of it carries over to other shots of the same film is measured, and may be
anything.
"""

import functools

import torch
from torch import Tensor

from fused.io.video import count_frames, read_clip
from harness.fixtures.video import SHIPPED
from harness.learning.task import Batch, Data, Recipe, Task

SIDE, FRAMES, STRIDE = 32, 6, 2  # every second frame
SEEN, ASKED = 0.6, 0.7  # of the video's time: training ends here, what is held out begins there
SPAN = (FRAMES - 1) * STRIDE + 1


@functools.cache
def frames() -> Tensor:
    """Every frame of the shipped clip, (3, 132, SIDE, SIDE)."""
    return read_clip(SHIPPED, count_frames(SHIPPED), SIDE)


def shown(film: Tensor, starts: Tensor, backwards: Tensor) -> Tensor:
    """Clips (B, 3, FRAMES, SIDE, SIDE) that begin at the frames `starts`, some in the opposite order."""
    places = starts[:, None] + STRIDE * torch.arange(FRAMES)
    places = torch.where(backwards[:, None], places.flip(1), places)
    return film[:, places].transpose(0, 1)


def data() -> Data:
    """Training clips are mirrored at random; what is held out is every clip of the last part, both ways."""
    film = frames()
    last = round(SEEN * film.shape[1]) - SPAN
    begins = torch.arange(round(ASKED * film.shape[1]), film.shape[1] - SPAN + 1).repeat(2)
    reverse = torch.arange(len(begins)) < len(begins) // 2

    def draw(generator: torch.Generator, count: int) -> Batch:
        starts = torch.randint(last + 1, (count,), generator=generator)
        backwards, mirrored = (torch.rand(2, count, generator=generator) < 0.5).unbind()
        clips = shown(film, starts, backwards)
        return torch.where(mirrored[:, None, None, None, None], clips.flip(-1), clips), backwards.long()

    return Data(draw, (shown(film, begins, reverse), reverse.long()))


TASK = Task(
    "arrow",
    "time's arrow on the shipped clip",
    {"img_size": SIDE, "patch_size": 16, "channels": 3, "num_frames": FRAMES, "num_classes": 2, "embed_dim": 32, "depth": 2,
     "drop_path_rate": 0.0, "scan_order": "temporal", "ssm_cfg": {"d_state": 8}},
    data,
    full=Recipe(steps=300, batch=32, lr=5e-3, bar=None),
    short=Recipe(steps=10, batch=16, lr=5e-3, bar=None),
)  # fmt: skip
