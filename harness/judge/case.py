"""One point at which a question is asked: a subject's sizes, options and dtype, and the seeds of its inputs."""

import math
import zlib
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor

SEEDS = 4  # how many seeds a question pools
# A case with fewer token values than SMALL has too few rounding errors to average over. It pools MANY seeds, ROUNDINGS of
# which in a row share a draw but for JITTER, a relative change that rounds afresh: where one ill-conditioned draw is most of
# the error, the ratio of two single rounding errors would be a lottery (of 192 draws of one case, two exceeded 2).
SMALL, MANY, ROUNDINGS, JITTER = 4096, 16, 8, 0.01

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


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
        """Whether any of the options is set."""
        return any(option in self.options for option in options)

    def option(self, key: str, default: str) -> str:
        """The value of an option written `key=value`."""
        return next((o.partition("=")[2] for o in self.options if o.startswith(key + "=")), default)

    @property
    def name(self) -> str:
        """What the case is called on the command line and in records; unique within a subject."""
        return "-".join([*(f"{k}{v}" for k, v in self.dims), *self.options, self.dtype])

    @property
    def asker(self) -> str:
        """The only check that is asked here; empty for all."""
        return self.option("for", "")

    @property
    def seeds(self) -> range:
        """The seeds pooled: a ratio of two rounding errors needs a sample, of tokens or of seeds."""
        return range(MANY if self.small else SEEDS)

    @property
    def small(self) -> bool:
        """Whether there are too few tokens to average over; slopes, asked in float64, need no average. The classifier's logits
        hang on one token a clip, whose rounding scales all gradients of its last layer."""
        sizes = dict(self.dims)
        tokens = 1 if self.subject == "videomamba" and not self.has("state") else sizes["L"]
        values = sizes["B"] * tokens * sizes.get("E", sizes.get("D", 1))
        return values < SMALL and self.dtype != "float64"

    @property
    def jittered(self) -> bool:
        """Whether seeds in a row share a draw but for JITTER; fitted weights are asked as they are, with other clips."""
        return self.small and not self.has("trained")

    @property
    def torch_dtype(self) -> torch.dtype:
        """The case's precision."""
        return DTYPES[self.dtype]

    def matches(self, patterns: list[str]) -> bool:
        """Whether the name fits one of the shell patterns; no pattern fits all."""
        return not patterns or any(fnmatchcase(self.name, p) for p in patterns)

    def generator(self, seed: int, what: str) -> torch.Generator:
        """Numbers for one tensor, the same on every box and in every process and dtype, independent of other tensors."""
        words = f"{self.subject}/{self.dims}/{self.options}/{seed}/{what}"
        return torch.Generator().manual_seed(zlib.crc32(words.encode()))

    def normal(self, seed: int, what: str, *shape: int) -> Tensor:
        """Standard normal numbers, float64 on the CPU."""
        return torch.randn(*shape, generator=self.generator(seed, what), dtype=torch.float64)

    def jitter(self, x: Tensor, seed: int, what: str) -> Tensor:
        """x, every number changed by about JITTER of itself."""
        return x * (1 + JITTER * self.normal(seed, "jitter " + what, *x.shape).to(x.device))

    def log_uniform(self, seed: int, what: str, low: float, high: float, *shape: int) -> Tensor:
        """Numbers between low and high, uniform in their logarithm, float64 on the CPU."""
        u = torch.rand(*shape, generator=self.generator(seed, what), dtype=torch.float64)
        return torch.exp(u * math.log(high / low) + math.log(low))


def cross(subject: str, shapes: list[dict[str, int]], options: list[tuple[str, ...]], dtypes: list[str]) -> list[Case]:
    """A case for every shape, set of options and dtype."""
    return [Case(subject, tuple(shape.items()), o, d) for shape in shapes for o in options for d in dtypes]
