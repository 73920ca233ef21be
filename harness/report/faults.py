"""How an answer fails, told by kind, and which times of a rival get a mark for it."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

from harness.records.finding import Finding
from harness.records.record import Record
from harness.records.speed import Speed
from harness.runs.store import Run

OUTSIDE, NOT_ZERO, NOT_REPEATABLE = "outside the budget", "not exactly zero where zero is due", "not repeatable"
OTHER, REFUSED, CRASHED = "another property broken", "refused", "crashed"
KINDS = (OUTSIDE, NOT_ZERO, NOT_REPEATABLE, OTHER, REFUSED, CRASHED, "out of memory", "out of time")
MARKED = 1.1  # a rival's time is marked from an error of so many budgets on
REFUSALS = ("NotImplementedError", "ValueError", "AssertionError", "UnsupportedError")


class Fault(NamedTuple):
    """A kind of failure; where it is an error outside the budget, by what factor, and as a share of the truth's norm."""

    kind: str
    factor: float = 0.0
    relative: float = 0.0


def of_finding(finding: Finding) -> str:
    """Return the kind of a finding that fails."""
    if finding.norm == "bitwise":
        return NOT_REPEATABLE
    if finding.norm in ("l2", "max", "zero") and finding.budget == 0 and math.isfinite(finding.error):
        return NOT_ZERO
    return OUTSIDE if finding.norm in ("l2", "max") else OTHER


def of(record: Record) -> Fault:
    """Return the fault of a record that failed: of several kinds, the one that stands first in `KINDS`."""
    if record.status == "fail":
        bad = [f for f in record.findings if not f.passed]
        outside = [f for f in bad if of_finding(f) == OUTSIDE]
        if outside:
            worst = max(outside, key=lambda f: f.ratio)
            return Fault(OUTSIDE, worst.ratio, worst.error / worst.scale if worst.scale else math.inf)
        return Fault(min((of_finding(f) for f in bad), key=KINDS.index))
    if record.status == "error":
        return Fault(REFUSED if record.reason.startswith(REFUSALS) else CRASHED)
    return Fault({"oom": "out of memory", "timeout": "out of time"}[record.status])


def counted(records: Iterable[Record]) -> dict[str, int]:
    """Return how many failures there are of each kind."""
    found = Counter(of(r).kind for r in records if r.failed)
    return {kind: found[kind] for kind in KINDS if found[kind]}


def in_words(records: Sequence[Record]) -> str:
    """Return the failures by kind, with the largest factor of those outside the budget; "" without any."""
    said = [f"{n} {kind}" for kind, n in counted(records).items()]
    outside = [f for r in records if r.failed and (f := of(r)).kind == OUTSIDE]
    if outside:
        worst = max(outside, key=lambda f: f.factor)
        said[0] += f" (at most {worst.factor:.3g} budgets, a relative error of {worst.relative:.2g})"
    return ", ".join(said)


def marked(run: Run) -> list[Speed]:
    """Return a run's speeds, in each of which `wrong` is by how many budgets its answers were outside, by the run's records.

    What fails in another way, or by less than a tenth of a budget, is no reason to doubt a time: `wrong` is 0 then.
    """
    factors: dict[tuple[str, str, str, str], float] = {}
    for r in run.records:
        if r.status == "fail" and (fault := of(r)).kind == OUTSIDE:
            key = (r.subject, r.implementation, r.dtype, r.check)
            factors[key] = max(factors.get(key, 0.0), fault.factor)
    judged = {(r.subject, r.implementation, r.dtype) for r in run.records if r.status == "fail"}

    def corrected(s: Speed) -> Speed:
        who = (s.entry.subject, s.entry.implementation, s.point.dtype)
        if not s.wrong or who not in judged:
            return s
        checks = [check for *same, check in factors if tuple(same) == who and (check != "backward" or s.point.mode == "train")]
        factor = max((factors[*who, check] for check in checks), default=0.0)
        return replace(s, wrong=factor if factor > MARKED else 0.0, reason=s.reason if factor > MARKED else "")

    return [corrected(s) for s in run.speeds]
