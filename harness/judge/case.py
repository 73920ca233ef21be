"""One point at which a question is asked: a subject's sizes, options and dtype."""

import math
import zlib
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor

JITTER = 0.01  # a relative change after which everything computed from a tensor rounds afresh

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
LOW_PRECISIONS = ["float32", "bfloat16", "float16"]  # those of which float64 is the truth


@dataclass(frozen=True)
class Case:
    """`dims` are (letter, size) pairs, `options` are words that the subject understands; `video` is a file or empty."""

    subject: str
    dims: tuple[tuple[str, int], ...]
    options: tuple[str, ...] = ()
    dtype: str = "float32"
    video: str = ""

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}; allowed are {', '.join(DTYPES)}")

    def __getitem__(self, letter: str) -> int:
        return dict(self.dims)[letter]

    def has(self, *options: str) -> bool:
        """Return whether any of the options is set."""
        return any(option in self.options for option in options)

    def option(self, key: str, default: str) -> str:
        """Return the value of an option written `key=value`."""
        return next((o.partition("=")[2] for o in self.options if o.startswith(key + "=")), default)

    def fits(self, **sizes: int) -> bool:
        """Return whether the case has these sizes, whatever its others are."""
        return dict(self.dims).items() >= sizes.items()

    @property
    def name(self) -> str:
        """Return the case's name on the command line and in records; unique within a subject."""
        return "-".join([*(f"{k}{v}" for k, v in self.dims), *self.options, self.dtype])

    @property
    def only_check(self) -> str:
        """Return the name of the only check that asks this case; empty where all may."""
        return self.option("for", "")

    @property
    def torch_dtype(self) -> torch.dtype:
        """Return the case's precision."""
        return DTYPES[self.dtype]

    def matches(self, patterns: list[str]) -> bool:
        """Return whether the name fits one of the shell patterns; no pattern fits all."""
        return not patterns or any(fnmatchcase(self.name, p) for p in patterns)

    def generator(self, seed: int, name: str) -> torch.Generator:
        """Return the random numbers of one tensor: the same on every box and in every process and dtype, and independent of
        other tensors."""
        words = f"{self.subject}/{self.dims}/{self.options}/{seed}/{name}"
        return torch.Generator().manual_seed(zlib.crc32(words.encode()))

    def normal(self, seed: int, name: str, *shape: int) -> Tensor:
        """Draw standard normal numbers, float64 on the CPU."""
        return torch.randn(shape, generator=self.generator(seed, name), dtype=torch.float64)

    def jitter(self, x: Tensor, seed: int, name: str) -> Tensor:
        """Return x with every number changed by about JITTER of itself."""
        return x * (1 + JITTER * self.normal(seed, "jitter " + name, *x.shape).to(x.device))

    def log_uniform(self, seed: int, name: str, low: float, high: float, *shape: int) -> Tensor:
        """Draw numbers between low and high, uniform in their logarithm, float64 on the CPU."""
        u = torch.rand(*shape, generator=self.generator(seed, name), dtype=torch.float64)
        return torch.exp(u * math.log(high / low) + math.log(low))


def cross(subject: str, shapes: list[dict[str, int]], options: list[tuple[str, ...]], dtypes: list[str]) -> list[Case]:
    """Return a case for every shape, set of options and dtype."""
    return [Case(subject, tuple(shape.items()), o, d) for shape in shapes for o in options for d in dtypes]
