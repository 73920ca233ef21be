"""Rates that a box reaches at best, in which the bounds of subjects are counted."""

import math
from dataclasses import asdict, dataclass
from typing import Any

ISSUED_PER_EXP = 8  # lane-instructions that a multiprocessor issues for each special function: 128 and 16 a cycle
WORDS = {"copy": "memory traffic", "matmul": "matrix products", "exp": "exponentials", "issue": "instructions"}


@dataclass(frozen=True)
class Ceilings:
    """Rates that hold at a point: bytes/s of memory (read plus written), multiply-adds counted as 2 operations/s of a matmul,
    exponentials/s, instructions/s. A rate of infinity bounds nothing."""

    copy: float
    matmul: float
    exp: float
    issue: float = math.inf


@dataclass(frozen=True)
class BoxCeilings:
    """The rates of a box. `copies` are (bytes that are moved again and again, bytes/s), small ones first: what fits into a
    cache moves faster. `matmuls` are by dtype. `issue` is None where it is not known. `uncertainty` is by how much of itself
    a rate may be too low."""

    copies: tuple[tuple[int, float], ...]
    matmuls: dict[str, float]
    exp: float
    issue: float | None = None
    uncertainty: float = 0.0

    def at(self, dtype: str, resident: float) -> Ceilings:
        """Return the rates at a point in a dtype whose data are `resident` bytes, all moved once by each pass over them.

        Memory has the best rate of as many bytes or more, from the next smaller measured number on.
        """
        smaller = [size for size, _ in self.copies if size <= resident]
        least = max(smaller, default=0)
        copy = max(rate for size, rate in self.copies if size >= least)
        issue = math.inf if self.issue is None else self.issue
        return Ceilings(copy, self.matmuls.get(dtype, math.inf), self.exp, issue)

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON types."""
        return asdict(self)

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> "BoxCeilings":
        """Return what `to_json` wrote."""
        return cls(**raw | {"copies": tuple((size, rate) for size, rate in raw["copies"])})


def element_bytes(dtype: str) -> int:
    """Return the bytes of one element."""
    return {"float32": 4, "float64": 8}.get(dtype, 2)
