"""Records as Markdown tables and lists."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence

from harness.records.record import Record
from harness.report.markdown import Markdown, bold, escape, fence, join, table

SHOWN = 30  # failures in full; records.jsonl has all


def number(x: float) -> str:
    """Return three digits."""
    return f"{x:.3g}" if math.isfinite(x) else "inf"


def mark(record: Record) -> str:
    """Return the mark after the name of a rival."""
    return " (rival)" if record.role == "rival" else ""


def matrix(records: Sequence[Record]) -> str:
    """Return a table of checks by implementations, of one subject's records."""
    checks = list(dict.fromkeys(r.check for r in records if r.check != "all"))
    names = list(dict.fromkeys((r.implementation, r.role) for r in records))
    absent = {r.implementation for r in records if r.check == "all"}
    head = [n + " (rival)" * (role == "rival") + " (not run)" * (n in absent) for n, role in names]
    rows = [
        [check, *(_cell([r for r in records if (r.check, r.implementation, r.role) == (check, *who)]) for who in names)]
        for check in checks
    ]
    return table(["check", *head], rows)


def _cell(records: list[Record]) -> str:
    """Return how many of these records passed, failed and were skipped."""
    failed, skipped = sum(r.failed for r in records), sum(r.status == "skip" for r in records)
    ran = len(records) - skipped
    parts = [Markdown(f"{bold(f'{failed} FAILED')} of {ran}")] if failed else [f"{ran} pass"] if ran else []
    return join([*parts, *[f"{skipped} skip"] * bool(skipped)]) or "-"


def worst_errors(records: Iterable[Record]) -> str:
    """Return the finding with the most budgets spent, per subject, check, implementation and dtype."""
    groups: dict[tuple[str, str, str, str], list[Record]] = {}
    for r in records:
        if r.findings:
            groups.setdefault((r.subject, r.check, r.implementation + mark(r), r.dtype), []).append(r)
    rows = []
    for key, group in sorted(groups.items()):
        found = [(f, r.case) for r in group for f in r.findings]
        worst, case = max(found, key=lambda pair: (not pair[0].passed, pair[0].ratio))
        ratio = number(worst.ratio) if worst.passed else bold(number(worst.ratio))
        rows.append([*key, ratio, f"{worst.tensor} ({worst.norm})", case])
    if not rows:
        return "No finding."
    return table(["subject", "check", "implementation", "dtype", "worst, in budgets", "tensor (norm)", "case"], rows)


def failures(records: Iterable[Record]) -> str:
    """Return the first failures, ours before rivals', each with the command that asks it again."""
    failed = sorted((r for r in records if r.failed), key=lambda r: r.role == "rival")
    if not failed:
        return "None."
    parts = [f"The first {SHOWN} of {len(failed)}; records.jsonl has all."] if len(failed) > SHOWN else []
    for i, r in enumerate(failed[:SHOWN], 1):
        lines = [f"{i}. **{r.status.upper()}** ({r.role}) {join((r.check, r.subject, r.implementation, r.case))}"]
        if f := r.worst:
            index = f", worst at {tuple(f.worst)}" if f.worst else ""
            count = sum(not g.passed for g in r.findings)
            size = f"error {number(f.error)}, may be {number(f.budget)} ({number(f.ratio)} budgets)"
            note = f"; {escape(f.note)}" * bool(f.note)
            what = join((f.tensor, f.norm))
            lines.append(f"   {what}: {size}{index}{note}; {count} of {len(r.findings)} findings fail")
        lines += [f"   - {escape(line)}" for line in (r.location.lines() if r.location else [])]
        lines += [f"   reason: {escape(r.reason)}"] * bool(r.reason)
        parts.append("\n\n".join([*lines, fence(r.command, "   ")]))
    return "\n\n".join(parts)


def skips(records: Iterable[Record]) -> str:
    """Return the reasons for which single questions were skipped, by count."""
    skipped = [r for r in records if r.status == "skip" and r.check != "all"]
    reasons = Counter((r.subject, r.implementation + mark(r), r.reason) for r in skipped)
    if not reasons:
        return "None."
    rows = [[n, *why] for why, n in sorted(reasons.items(), key=lambda item: (-item[1], item[0]))]
    return table(["questions", "subject", "implementation", "reason"], rows)
