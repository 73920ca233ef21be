"""Rates that a box reaches at best, in which the bounds of subjects are counted."""

from dataclasses import dataclass

ISSUED_PER_EXP = 8  # lane-instructions that a multiprocessor issues for each special function: 128 and 16 a cycle


@dataclass(frozen=True)
class Ceilings:
    """Rates: bytes/s of a copy (read plus written), multiply-adds counted as 2 operations/s of a matmul, exponentials/s."""

    copy: float
    matmul: float
    exp: float


def element_bytes(dtype: str) -> int:
    """Return the bytes of one element."""
    return {"float32": 4, "float64": 8}.get(dtype, 2)
