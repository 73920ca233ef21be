"""How the error of the scan grows with the sequence, beside its budget."""

import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from harness.judge.case import DTYPES
from harness.records.record import Record
from harness.report import things
from harness.report.figures import Drawing, chart, legend, line_look, logarithmic

CHECKS = ("forward", "backward")


class _Point(NamedTuple):
    """A record's worst error and its budget at a length, as shares of the truth's norm."""

    implementation: str
    length: int
    error: float
    budget: float
    passed: bool


def against_length(records: Iterable[Record], folder: Path) -> list[Drawing]:
    """Draw error-CHECK-DTYPE.svg for each check and dtype in which a record of the scan can be drawn."""
    panels: dict[tuple[str, str], list[_Point]] = {}
    for r in records:
        if (check := _panel_of(r)) and (point := _point(r)):
            panels.setdefault((check, r.dtype), []).append(point)
    order = sorted(panels, key=lambda key: (CHECKS.index(key[0]), list(DTYPES).index(key[1])))
    return [_draw(check, dtype, panels[check, dtype], folder) for check, dtype in order]


def _draw(check: str, dtype: str, points: list[_Point], folder: Path) -> Drawing:
    names = sorted({p.implementation for p in points}, key=things.rank)
    stem = f"error-{check}-{dtype}"
    with chart(folder, stem) as axes:
        axes.set(xscale="log", yscale="log", xlabel="tokens (implementations side by side)", ylabel="error / norm of the truth")
        for p in points:
            look, place = things.look(p.implementation), names.index(p.implementation)
            x = p.length * 1.07 ** (place - (len(names) - 1) / 2)  # side by side, or the last would hide the others
            axes.plot(x, p.error, **line_look(look))
            if not p.passed:
                axes.plot(x, p.error, "o", markersize=11, markerfacecolor="none", markeredgecolor=look.colour)
        budgets: dict[int, float] = {}
        for p in points:
            if p.passed:  # what failed may be a tensor of another dtype; a ring says that it failed
                budgets[p.length] = min(p.budget, budgets.get(p.length, math.inf))
        axes.plot(sorted(budgets), [budgets[n] for n in sorted(budgets)], color="0.5", linewidth=1)
        logarithmic(axes.xaxis)
        legend(axes, [things.look(n) for n in names], linewidth=0)
    failed = sum(not p.passed for p in points)
    return Drawing(folder / f"{stem}.svg", f"{check}, {dtype}" + f"; in a ring: {failed} failed" * bool(failed))


def _panel_of(record: Record) -> str | None:
    """Return the check of a record of the scan: `extremes` asks both questions, at its lengths."""
    if record.subject != "scan" or record.dtype not in DTYPES:
        return None
    if record.check == "extremes" and "-length-" in record.case:
        return "forward" if "-infer-" in record.case else "backward"
    return record.check if record.check in CHECKS else None


def _point(record: Record) -> _Point | None:
    """Return the worst tensor in l2: if any failed, the one with the most budgets spent, else the one with the largest error.

    The latter is returned in the case's dtype (a bfloat16 case also returns float32 gradients, whose budget is another).
    A log scale has no place for errors that are 0 or infinite: None.
    """
    length = re.search(r"(?:^|-)L(\d+)(?:-|$)", record.case)
    if not length or int(length[1]) == 0:
        return None
    found = [f for f in record.findings if f.norm == "l2" and f.scale > 0 and f.budget > 0 and f.error > 0]
    found = [f for f in found if math.isfinite(f.error / f.scale)]
    if not found:
        return None
    worst = max(found, key=lambda f: (not f.passed, f.error / f.scale if f.passed else f.ratio))
    return _Point(
        record.implementation, int(length[1]), worst.error / worst.scale, worst.budget / worst.scale, not record.failed
    )
