"""Which digit is it? The image model on scikit-learn's handwritten digits, 8x8 pixels.

Every fifth is held out; the same hands wrote the rest.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from harness.learning.task import Batch, Data, Recipe, Task

FOLD = 5  # one in so many is held out
MEAN, STD = 0.305, 0.376  # of all pixels in 0..1
SHIFT = 1  # pixels by which a training image is shifted at most


@functools.cache
def images() -> tuple[Tensor, Tensor]:
    """Return all digits in the file's order, (1797, 8, 8) in 0..1, and their classes, int64 (1797,).

    Raises ImportError without scikit-learn.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("the digits come from scikit-learn: pip install 'videomamba-bench[harness]'") from error
    found = load_digits()
    return torch.from_numpy(found.images).float() / 16, torch.from_numpy(found.target).long()


def split(of_digits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rows (1438, ...) of digits for training, and the rows (359, ...) of those that are held out."""
    held_out = torch.arange(len(of_digits)) % FOLD == FOLD - 1
    return of_digits[~held_out], of_digits[held_out]


def data() -> Data:
    """Return digits for training, shifted at random, and the held-out ones as they are."""
    known, labels = images()
    (pixels, held_out), (classes, answers) = split(((known - MEAN) / STD)[:, None]), split(labels)

    def draw(generator: torch.Generator, count: int) -> Batch:
        chosen = torch.randint(len(pixels), (count,), generator=generator)
        wide = F.pad(pixels[chosen], (SHIFT,) * 4, value=-MEAN / STD)
        places = torch.randint(2 * SHIFT + 1, (2, count), generator=generator)
        rows, columns = (places[:, :, None] + torch.arange(8)).unbind()
        each = torch.arange(count)[:, None, None]
        return wide[each, 0, rows[:, :, None], columns[:, None, :]][:, None], classes[chosen]

    return Data(draw, (held_out, answers))


TASK = Task(
    "digits",
    "handwritten digits, the image model",
    {"img_size": 8, "patch_size": 4, "channels": 1, "num_frames": None, "num_classes": 10, "embed_dim": 48, "depth": 2,
     "drop_path_rate": 0.0, "ssm_cfg": {"d_state": 8}},
    data,
    full=Recipe(steps=500, batch=64, lr=5e-3, bar=0.95),
    short=Recipe(steps=80, batch=32, lr=8e-3, bar=0.5),
)  # fmt: skip
