"""The least time that the hardware needs for a point, from ceilings measured in the same run.

A subject carries its own bound. An operator is bound by the bytes that it must move, by its exponentials, or by the
instructions around them, whichever takes longest; a model by the sum over its parts, one after another.
"""

import math
from dataclasses import replace

from harness.judge.protocols import Timed
from harness.judge.registry import subjects
from harness.records.ceilings import WORDS, BoxCeilings, Ceilings
from harness.records.speed import Point, Speed

UNBOUND = Ceilings(math.inf, math.inf, math.inf)
PASSES = {"infer": 1, "train": 3}  # over the data of a call, at most: forward, and both tensors and gradients in backward


class NoBound(TypeError):
    """A timed subject has no bound or no licence."""


def timed(subject: str) -> Timed:
    """Return a subject that carries a bound and a licence. Raises NoBound for another: no other subject's bound stands in."""
    module = subjects()[subject]
    if not isinstance(module, Timed):
        missing = [name for name in ("bound", "licence") if not hasattr(module, name)]
        raise NoBound(f"subject {subject!r} has no {' and no '.join(missing)}: see Timed in harness/judge/protocols.py")
    return module


def bound(point: Point, subject: str, variant: str, ceilings: Ceilings) -> float:
    """Return the seconds that one call needs at least; `variant` is a model's size. Raises NoBound."""
    return timed(subject).bound(point, variant, ceilings)


def bounded(speed: Speed, box: BoxCeilings) -> Speed:
    """Return a speed with the bound of its point, the ceiling that most of it comes from, and how wrong that may be.

    Raises NoBound.
    """
    subject, variant, point = speed.entry.subject, speed.entry.variant, speed.point

    def alone(name: str, rate: float) -> float:
        """Return the seconds if one ceiling were the only one."""
        return bound(point, subject, variant, replace(UNBOUND, **{name: rate}))

    # The bytes of one pass; of a model's parts each may find in the cache what the one before left there.
    resident = 0.0 if variant else alone("copy", 1.0) / PASSES[point.mode]
    ceilings = box.at(point.dtype, resident)
    parts = {name: alone(name, getattr(ceilings, name)) for name in WORDS}
    seconds = bound(point, subject, variant, ceilings)
    return replace(speed, bound=seconds, bound_by=max(parts, key=lambda name: parts[name]), bound_error=box.uncertainty)
