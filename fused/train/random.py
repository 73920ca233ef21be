"""Random numbers of masks, negatives and mixtures, drawn on the CPU so that a seed gives the same values for every device.

`generator` is a CPU `torch.Generator`, or None for PyTorch's default generator, which `setup_seed` seeds. Every function
raises TypeError for a generator of another type and ValueError for one on another device.
"""

import random

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def random_subset(batch: int, size: int, count: int, generator: torch.Generator | None) -> Bool[Tensor, "batch size"]:
    """Return a bool (batch, size) on the CPU with `count` True in each row; all subsets are equally likely."""
    # float64: 1568 float32 numbers hold two equal ones in 1 of 14 draws, and the sort would then favour one of them
    noise = torch.rand(batch, size, generator=check_generator(generator), dtype=torch.float64, device="cpu")
    return noise.argsort(dim=1) < count


def gumbel_noise(shape: tuple[int, ...], generator: torch.Generator | None, device: torch.device) -> Float[Tensor, "..."]:
    """Return standard Gumbel noise in float32 on `device`.

    The k largest of (log weight + noise) are k draws without replacement in proportion to the weights (arXiv 1903.06059).
    """
    noise = torch.empty(shape, dtype=torch.float64, device="cpu").exponential_(generator=check_generator(generator))
    return -noise.log().to(torch.float32).to(device)


def sample_beta(alpha: int | float, generator: torch.Generator | None) -> float:
    """Return one number of Beta(alpha, alpha), alpha > 0."""
    # torch.distributions.Beta takes no generator, Python's generator takes a seed
    return random.Random(sample_integer(2**62, generator)).betavariate(alpha, alpha)


def sample_uniform(generator: torch.Generator | None) -> float:
    """Return one number of the uniform distribution over [0, 1)."""
    return torch.rand((), generator=check_generator(generator), dtype=torch.float64, device="cpu").item()


def sample_integer(limit: int, generator: torch.Generator | None) -> int:
    """Return one integer of 0 to limit - 1."""
    return int(torch.randint(limit, (), generator=check_generator(generator), device="cpu").item())


def check_generator(generator: torch.Generator | None) -> torch.Generator | None:
    """Return the generator. Raise TypeError unless it is a torch.Generator or None, ValueError unless it is on the CPU."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator on the CPU, or None, got {type(generator).__name__}")
    if generator is not None and generator.device.type != "cpu":
        raise ValueError(f"generator must be a torch.Generator on the CPU, or None, got one on {generator.device}")
    return generator
