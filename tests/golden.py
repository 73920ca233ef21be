"""Deterministic weights and inputs, with which upstream's code gave the numbers of `test_golden.py`, and their comparison."""

import math

import torch
from torch import Tensor, nn


def fill(*shape: int, phase: int) -> Tensor:
    """Return float32 numbers 2 frac(43758.5453 sin(12.9898 (i + 1) + phase)) - 1 for i = 0, 1, ..., computed in float64."""
    i = torch.arange(1, math.prod(shape) + 1, dtype=torch.float64)
    wave = 43758.5453 * torch.sin(12.9898 * i + phase)
    return (2 * (wave - wave.floor()) - 1).float().view(shape)


def golden_value(name: str, like: Tensor) -> Tensor:
    """Return the value of a parameter with this full dotted name, of the shape of `like`."""
    w = fill(*like.shape, phase=sum(name.encode()) % 97)
    leaf = name.rsplit(".", 1)[-1]
    if leaf == "A_log" and like.dim() == 1:  # Mamba-2
        return torch.log(1 + torch.arange(len(like)) % 16) + 0.1 * w
    if leaf == "alpha":  # Vamba
        return 0.5 + 0.3 * w
    if leaf == "dt_bias":
        return w - 2
    if leaf in ("A_log", "A_b_log"):
        return torch.arange(1, like.shape[1] + 1).log() + 0.1 * w
    if leaf in ("D", "D_b") or (leaf == "weight" and like.dim() == 1):
        return 1 + 0.1 * w
    if leaf == "bias":
        return 0.1 * w
    if leaf == "weight":
        return w * math.sqrt(3 / (like.numel() / like.shape[0]))
    return 0.5 * w


def golden(module: nn.Module) -> nn.Module:
    """Load golden weights into the module, strictly, as a state_dict in upstream's layout; return it in eval mode."""
    weights = {name: golden_value(name, value) for name, value in module.state_dict().items()}
    module.load_state_dict(weights, strict=True)
    return module.eval()


def assert_golden(got: Tensor, wanted: str) -> None:
    """Assert |difference| <= 1e-5 max(1, |wanted|) for every number in the string, against the first elements of `got`."""
    numbers = torch.tensor([float(x) for x in wanted.split()])
    difference = (got.detach().flatten()[: len(numbers)] - numbers).abs()
    assert (difference <= 1e-5 * numbers.abs().clamp(min=1)).all(), f"off by {difference.max():.2e}: {got.flatten()[:8]}"


def assert_sums(got: Tensor, total: str, absolute: str | None = None) -> None:
    """Assert that sums agree to 1e-5 of the sum of absolute values, or to half a unit of the last digit given."""
    size = got.detach().double().abs().sum().item()
    for text, value in ((total, got.detach().double().sum().item()), (absolute, size)):
        if text is not None:
            digit = 0.5 * 10.0 ** -len(text.partition(".")[2])
            assert abs(value - float(text)) <= max(1e-5 * size, digit), f"sum {value}, wanted {text}"
