"""Learning rates of a training: at its ends, at the end of warm-up, half way, and after a restart."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from fused import save_checkpoint
from fused.train import cosine_schedule

TOTAL, WARM = 110, 10


def training(**how: Any) -> tuple[torch.optim.Optimizer, LambdaLR]:
    layer = nn.Linear(2, 2)
    groups = [{"params": [layer.weight], "lr": 1.0}, {"params": [layer.bias], "lr": 0.5}]
    optimizer = torch.optim.AdamW(groups)
    return optimizer, cosine_schedule(optimizer, **{"total_steps": TOTAL, "warmup_steps": WARM} | how)


def rates(optimizer: torch.optim.Optimizer, schedule: LambdaLR, steps: int) -> list[tuple[float, ...]]:
    """Return the learning rates of both groups in each of the next `steps` steps."""
    found = []
    for _ in range(steps):
        found.append(tuple(group["lr"] for group in optimizer.param_groups))
        optimizer.step()
        schedule.step()
    return found


def test_shape() -> None:
    found = rates(*training(warmup_start=0.25, floor=0.125), TOTAL + 5)
    assert all(low == high / 2 for high, low in found), "every group in its own proportion, to the end"
    lr = [high for high, _ in found]
    assert lr[0] == 0.25 and lr[WARM // 2] == 0.625 and lr[WARM] == 1.0 == max(lr)
    assert lr[60] == pytest.approx(0.5625, rel=4 * torch.finfo(torch.float64).eps), "half way down"
    assert lr[TOTAL:] == [0.125] * 5 and lr[TOTAL - 1] > 0.125
    assert all(a < b for a, b in zip(lr[:WARM], lr[1 : WARM + 1], strict=True))
    assert all(a > b for a, b in zip(lr[WARM:TOTAL], lr[WARM + 1 : TOTAL + 1], strict=True))
    for s in range(WARM, TOTAL):
        wanted = 0.125 + 0.875 * math.cos(math.pi * (s - WARM) / (TOTAL - WARM) / 2) ** 2  # (1 + cos 2a) / 2 = cos^2 a
        assert lr[s] == pytest.approx(wanted, rel=4 * torch.finfo(torch.float64).eps)


def test_without_warmup_and_defaults() -> None:
    assert rates(*training(warmup_steps=0), 1)[0][0] == 1.0
    found = rates(*training(), TOTAL + 1)
    assert found[0] == (0.0, 0.0) == found[TOTAL] and found[WARM] == (1.0, 0.5)


@pytest.mark.parametrize("stop", [4, WARM, 57])
def test_restart(tmp_path: Path, stop: int) -> None:
    """The state passes through `save_checkpoint` and is read with weights_only=True."""
    whole = rates(*training(), TOTAL)
    optimizer, schedule = training()
    first = rates(optimizer, schedule, stop)
    save_checkpoint({"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}, tmp_path / "last.pth")
    stored = torch.load(tmp_path / "last.pth", weights_only=True)
    optimizer, schedule = training()
    optimizer.load_state_dict(stored["optimizer"])
    schedule.load_state_dict(stored["schedule"])
    assert first + rates(optimizer, schedule, TOTAL - stop) == whole


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("how", "error", "wanted"),
    [
        ({"total_steps": 0}, ValueError, "total_steps must be an integer from 1 up, got 0"),
        ({"total_steps": 1.5}, TypeError, "total_steps must be an integer from 1 up, got float"),
        ({"warmup_steps": TOTAL}, ValueError, "warmup_steps must be an integer from 0 to 109, got 110"),
        ({"warmup_start": 2}, ValueError, r"warmup_start must be a number in \[0, 1\], got 2"),
        ({"floor": -0.5}, ValueError, r"floor must be a number in \[0, 1\], got -0.5"),
    ],
)
def test_errors(how: dict[str, Any], error: type[Exception], wanted: str) -> None:
    with pytest.raises(error, match=wanted):
        training(**how)


@pytest.mark.usefixtures("unchecked")
def test_no_optimizer() -> None:
    with pytest.raises(TypeError, match="optimizer must be a torch.optim.Optimizer, got Linear"):
        cosine_schedule(nn.Linear(2, 2), 10)
