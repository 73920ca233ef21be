"""Random draws of masks, negatives and mixtures. All are made on the CPU, so that a seed means the same on every device.

`generator` is a CPU `torch.Generator`; None is PyTorch's own, which `setup_seed` seeds.
"""

import random

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def subset(batch: int, size: int, count: int, generator: torch.Generator | None) -> Bool[Tensor, "batch size"]:
    """In every row `count` True of `size`, each choice as likely as another. Bool, on the CPU."""
    # float64: among 1568 float32 numbers two are equal once in 14 draws, and then a sort would decide
    noise = torch.rand(batch, size, generator=checked(generator), dtype=torch.float64, device="cpu")
    return noise.argsort(dim=1) < count


def gumbel(shape: tuple[int, ...], generator: torch.Generator | None, device: torch.device) -> Float[Tensor, "..."]:
    """Standard Gumbel noise in float32 on `device`: the k largest of (log weight + noise) are k draws without replacement."""
    noise = torch.empty(shape, dtype=torch.float64, device="cpu").exponential_(generator=checked(generator))
    return -noise.log().to(torch.float32).to(device)


def beta(alpha: int | float, generator: torch.Generator | None) -> float:
    """One number of Beta(alpha, alpha). PyTorch's own takes no generator, Python's does."""
    return random.Random(uniform_integer(2**62, generator)).betavariate(alpha, alpha)


def uniform(generator: torch.Generator | None) -> float:
    """One number from 0 up to, not including, 1."""
    return torch.rand((), generator=checked(generator), dtype=torch.float64, device="cpu").item()


def uniform_integer(below: int, generator: torch.Generator | None) -> int:
    """One of 0 to below - 1."""
    return int(torch.randint(below, (), generator=checked(generator), device="cpu").item())


def checked(generator: torch.Generator | None) -> torch.Generator | None:
    """The generator, if draws on the CPU can take it. Raises TypeError or ValueError otherwise."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator on the CPU, or None, got {type(generator).__name__}")
    if generator is not None and generator.device.type != "cpu":
        raise ValueError(f"generator must be a torch.Generator on the CPU, or None, got one on {generator.device}")
    return generator
