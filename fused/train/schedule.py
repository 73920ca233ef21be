"""The learning rate over a training: linear warm-up, then half a cosine (arXiv 1608.03983, without restarts)."""

import math
from collections.abc import Callable

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from fused.rules import check_integer, check_number


def cosine_schedule(
    optimizer: Optimizer, total_steps: int, warmup_steps: int = 0, warmup_start: int | float = 0.0, floor: int | float = 0.0
) -> LambdaLR:
    """Return a scheduler; call its `step` after every step of the optimiser. Step s, counted from 0, runs at lr * f(s):

        s < warmup_steps    f = warmup_start + (1 - warmup_start) * s / warmup_steps
        then                f = floor + (1 - floor) * (1 + cos(pi * (s - warmup_steps) / (total_steps - warmup_steps))) / 2
        s >= total_steps    f = floor

    `warmup_start` and `floor`, from 0 to 1, are fractions of each group's lr, so that the ratios of layer decay hold until
    the end; PyTorch's CosineAnnealingLR has one minimum for all groups. Upstream's min_lr 1e-5 under lr 1.2e-3 is
    floor=1e-5/1.2e-3. f depends on s alone: a training that resumes from a state_dict has the learning rates of one that was
    never stopped, bit for bit.

    0 <= warmup_steps < total_steps. Raises TypeError or ValueError for arguments out of range.
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"cosine_schedule: optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    return LambdaLR(optimizer, cosine_factor(total_steps, warmup_steps, warmup_start, floor))


def cosine_factor(
    total_steps: int, warmup_steps: int = 0, warmup_start: int | float = 0.0, floor: int | float = 0.0
) -> Callable[[int], float]:
    """Return the function f of `cosine_schedule`, which describes the arguments and the errors."""
    check_integer("cosine_schedule", "total_steps", total_steps, 1)
    check_integer("cosine_schedule", "warmup_steps", warmup_steps, 0, total_steps - 1)
    check_number("cosine_schedule", "warmup_start", warmup_start, 0, 1)
    check_number("cosine_schedule", "floor", floor, 0, 1)

    def factor(step: int) -> float:
        if step < warmup_steps:
            return warmup_start + (1 - warmup_start) * step / warmup_steps
        progress = min((step - warmup_steps) / (total_steps - warmup_steps), 1.0)
        return floor + (1 - floor) * (1 + math.cos(math.pi * progress)) / 2

    return factor
