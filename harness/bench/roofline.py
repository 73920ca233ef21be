"""The least time that the hardware needs for a point, from ceilings measured in the same run.

A subject carries its own bound. An operator is bound by the bytes that it must move, by its exponentials, or by the
instructions around them, whichever takes longest; a model by the sum over its parts, one after another.
"""

from harness.judge.protocols import Timed
from harness.judge.registry import subjects
from harness.records.ceilings import Ceilings
from harness.records.speed import Point


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
