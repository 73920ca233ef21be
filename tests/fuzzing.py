"""What the fuzz tests share: how many examples, tensors in any layout, values that nothing allows."""

import math
import os
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from torch import Tensor

EXAMPLES = int(os.environ.get("FUZZ", "200"))  # `nox -s fuzz` sets 10,000


def examples(share: float = 1.0) -> settings:
    """So many examples, or a share of them for costly ones; in the short form the same in every run."""
    return settings(
        max_examples=max(1, int(share * EXAMPLES)), deadline=None, derandomize=EXAMPLES <= 200, database=None,
        phases=[Phase.generate], suppress_health_check=list(HealthCheck),
    )  # fmt: skip


def dense(x: Tensor) -> Tensor:
    return x


def transposed(x: Tensor) -> Tensor:
    return x.mT.contiguous().mT if x.dim() > 1 else x


def columns(x: Tensor) -> Tensor:
    return torch.cat([torch.full_like(x, math.nan), x, torch.full_like(x, math.nan)], -1)[..., x.shape[-1] : 2 * x.shape[-1]]


def apart(x: Tensor) -> Tensor:
    return torch.stack([x, torch.full_like(x, math.nan)], -1)[..., 0]


def offset(x: Tensor) -> Tensor:
    return torch.cat([x.new_full((1,), math.nan), x.flatten()])[1:].view(x.shape)


LAYOUTS = [dense, transposed, columns, apart, offset]
SIZES, SEEDS = st.integers(1, 5), st.integers(0, 2**31 - 1)
DTYPES = st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16])
HOSTILE: list[Any] = [
    None, True, -1, 0, 10**20, 1.5, -0.5, math.nan, math.inf, "", "x", "../x", "\0", b"x", [], [1], [1, "x"], (), {}, {"a": 1},
    object(), torch.zeros(2), int,
]  # fmt: skip


def near(name: str, got: Tensor, truth: Tensor) -> None:
    """Both in float64: off by no more than one rounding of float32, which every fault of logic exceeds."""
    assert got.shape == truth.shape and got.dtype == truth.dtype == torch.float64, name
    unit = torch.finfo(torch.float32).eps / 2
    assert not truth.numel() or bool((got - truth).abs().max() <= unit * truth.abs().max()), name
