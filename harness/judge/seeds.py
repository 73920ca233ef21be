"""The seeds that a question pools: the ratio of two rounding errors needs a sample, of tokens or of seeds.

A case with fewer output values than SMALL has too few rounding errors to average over. It pools MANY seeds, ROUNDINGS of
which in a row share a draw but for `Case.jitter`, which rounds afresh: where one ill-conditioned draw is most of the error,
the ratio of two single rounding errors would be a lottery (of 192 draws of one case, two exceeded 2).
"""

from harness.judge.case import Case
from harness.judge.registry import subjects

SEEDS = 4
SMALL, MANY, ROUNDINGS = 4096, 16, 8


def is_small(case: Case) -> bool:
    """Return whether there are too few values to average over; slopes, asked in float64, need no average."""
    return subjects()[case.subject].output_values(case) < SMALL and case.dtype != "float64"


def seeds(case: Case) -> range:
    """Return the seeds that are pooled."""
    return range(MANY if is_small(case) else SEEDS)


def is_jittered(case: Case) -> bool:
    """Return whether seeds in a row share a draw but for the jitter; fitted weights are asked as they are, with other clips."""
    return is_small(case) and not case.has("trained")
