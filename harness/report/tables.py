"""Records as Markdown tables and lists."""

import math
from collections.abc import Iterable, Sequence

import pandas as pd

from harness.records.finding import Finding
from harness.records.record import Record
from harness.report import faults
from harness.report.markdown import Markdown, bold, escape, fence, frame, join

SHOWN = 30  # failures in full; records.jsonl has all


def number(x: float) -> str:
    """Return three digits."""
    return f"{x:.3g}" if math.isfinite(x) else "inf"


def mark(record: Record) -> str:
    """Return the mark after the name of a rival."""
    return " (rival)" if record.role == "rival" else ""


def matrix(records: Sequence[Record]) -> str:
    """Return a table of checks by implementations, of one subject's records."""
    absent = {r.implementation for r in records if r.check == "all"}
    rows = [
        (r.check, r.implementation + mark(r) + " (not run)" * (r.implementation in absent), r.status == "pass", r.failed)
        for r in records
    ]
    found = pd.DataFrame(rows, columns=["check", "implementation", "passed", "failed"])
    cells = found.groupby(["check", "implementation"], sort=False).apply(_cell, include_groups=False).unstack(fill_value="-")
    return frame(cells.reindex(columns=found.implementation.unique()).drop(index="all", errors="ignore"))


def _cell(answers: pd.DataFrame) -> str:
    """Return how many of these answers passed, failed and were skipped."""
    failed, passed = int(answers.failed.sum()), int(answers.passed.sum())
    ran, skipped = failed + passed, len(answers) - failed - passed
    parts = [Markdown(f"{bold(f'{failed} FAILED')} of {ran}")] if failed else [f"{ran} pass"] if ran else []
    return join([*parts, *[f"{skipped} skip"] * bool(skipped)]) or "-"


def failures(records: Iterable[Record], none: str = "None.") -> str:
    """Return the first failures, errors outside the budget before other kinds, each with the command that asks it again.

    Return `none` where nothing failed.
    """
    failed = sorted((r for r in records if r.failed), key=lambda r: faults.KINDS.index(faults.of(r).kind))
    if not failed:
        return none
    parts = [f"The first {SHOWN} of {len(failed)}; records.jsonl has all."] if len(failed) > SHOWN else []
    for i, r in enumerate(failed[:SHOWN], 1):
        lines = [f"{i}. {bold(faults.of(r).kind)} ({r.role}) {join((r.check, r.subject, r.implementation, r.case))}"]
        if f := r.worst:
            index = f", worst at {tuple(f.worst)}" if f.worst else ""
            count = sum(not g.passed for g in r.findings)
            note = f"; {escape(f.note)}" * bool(f.note)
            what = join((f.tensor, f.norm))
            lines.append(f"   {what}: {size(f)}{index}{note}; {count} of {len(r.findings)} findings fail")
        lines += [f"   - {escape(line)}" for line in (r.location.lines() if r.location else [])]
        lines += [f"   reason: {escape(r.reason)}"] * bool(r.reason)
        parts.append("\n\n".join([*lines, fence(r.command, "   ")]))
    return "\n\n".join(parts)


def size(finding: Finding) -> str:
    """Return the size of an error, beside what it may be."""
    kind = faults.of_finding(finding)
    if kind == faults.NOT_REPEATABLE:
        return f"{finding.error:,.0f} elements differ"
    if finding.budget == 0:
        return f"{number(finding.error)} where exactly 0 is due"
    return f"error {number(finding.error)}, may be {number(finding.budget)} ({number(finding.ratio)} budgets)"


def skips(records: Iterable[Record]) -> str:
    """Return the reasons for which single questions were skipped, by count."""
    skipped = [r for r in records if r.status == "skip" and r.check != "all"]
    if not skipped:
        return "None."
    rows = [(r.subject, r.implementation + mark(r), r.reason) for r in skipped]
    found = pd.DataFrame(rows, columns=["subject", "implementation", "reason"]).value_counts(sort=False).rename("questions")
    ordered = found.reset_index().sort_values("questions", ascending=False, kind="stable")
    return frame(ordered.set_index("questions"))
