"""Which way does the digit move? Handwritten digits on a torus; the held-out clips show other digits.

A digit that leaves on one side comes in on the other, and where it starts is uniform: no single frame tells the direction,
and a clip shown backwards is a clip of the opposite one.
Half of the digits lie on their side: with upright ones alone, right and left are learnt long before up and down. The head
reads the mean of all tokens, which takes fewer steps than CLS, which the scan reaches last.
"""

import torch
from torch import Tensor

from harness.learning import digits
from harness.learning.task import Batch, Data, Recipe, Task

DIRECTIONS = {"right": (0, 1), "down": (1, 0), "left": (0, -1), "up": (-1, 0)}  # rows and columns
SIDE, FRAMES, SPEED = 12, 6, 2  # pixels, frames, pixels a frame
HELD_OUT = 512  # clips
MEAN, STD = 0.136, 0.295  # of all pixels in 0..1: a digit fills 64 of 144


def clips(pixels: Tensor, generator: torch.Generator, count: int) -> Batch:
    """Return clips (count, 1, FRAMES, SIDE, SIDE) of digits drawn from `pixels` (any, 8, 8) in 0..1, and their directions."""
    chosen, classes = (torch.randint(n, (count,), generator=generator) for n in (len(pixels), len(DIRECTIONS)))
    lying = torch.rand(count, 1, 1, generator=generator) < 0.5
    shapes = torch.where(lying, pixels[chosen].mT, pixels[chosen])
    start = torch.randint(SIDE, (count, 1, 2), generator=generator)
    corner = start + torch.arange(FRAMES)[:, None] * SPEED * torch.tensor(list(DIRECTIONS.values()))[classes][:, None]
    rows, columns = ((corner[..., None] + torch.arange(8)) % SIDE).unbind(dim=2)  # each (count, FRAMES, 8)
    each, frame = torch.arange(count)[:, None, None, None], torch.arange(FRAMES)[:, None, None]
    shown = torch.zeros(count, FRAMES, SIDE, SIDE)
    shown[each, frame, rows[..., :, None], columns[..., None, :]] = shapes[:, None]
    return ((shown - MEAN) / STD)[:, None], classes


def data() -> Data:
    """Return clips of the digits that `digits` trains on, and clips of those that it holds out."""
    seen, others = digits.split(digits.images()[0])
    held_out = clips(others, torch.Generator().manual_seed(0), HELD_OUT)
    return Data(lambda generator, count: clips(seen, generator, count), held_out)


TASK = Task(
    "motion",
    "direction of a moving digit",
    {"img_size": SIDE, "patch_size": 6, "channels": 1, "num_frames": FRAMES, "num_classes": len(DIRECTIONS), "embed_dim": 32,
     "depth": 2, "drop_path_rate": 0.0, "readout": "mean", "ssm_cfg": {"d_state": 8}},
    data,
    full=Recipe(steps=300, batch=32, lr=8e-3, bar=0.9),
    short=Recipe(steps=70, batch=32, lr=8e-3, bar=0.8),
)  # fmt: skip
