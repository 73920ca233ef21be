"""Fitted weights that come with the project, written by `python -m harness learn --task motion --save-weights`.

The file holds the model, the fields of its configuration, and held-out digits of which its clips are made, so that parity asks
on trained weights and the data that they are for, on boxes without scikit-learn too.
"""

import functools
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fused import save_checkpoint
from fused.io.checkpoint_file import read_checkpoint
from harness.fixtures.video import SHIPPED
from harness.learning import digits, motion

PATH = SHIPPED.with_name("motion.pth")  # in the folder of the clip, in a checkout and where the wheel puts it
DIGITS = 64


class Trained(NamedTuple):
    """A kept model: `weights` in float32 by name; `pixels` (DIGITS, 8, 8) in 0..1, of held-out digits."""

    config: dict[str, Any]
    weights: dict[str, Tensor]
    pixels: Tensor


def save(model: nn.Module, path: Path = PATH) -> Path:
    """Write the weights of a model that learnt the task `motion`; return the path."""
    pixels = digits.split(digits.images()[0])[1][:DIGITS]
    weights = {name: p.detach().cpu() for name, p in model.state_dict().items()}
    return save_checkpoint({"model": weights, "config": motion.TASK.config, "digits": (16 * pixels).to(torch.uint8)}, path)


@functools.cache
def read(path: Path = PATH) -> Trained:
    """Read the file that `save` wrote."""
    kept = read_checkpoint(path)
    return Trained(dict(kept["config"]), dict(kept["model"]), kept["digits"].float() / 16)
