"""How much of their budgets the answers of a parity run spend: a map, a plot, the tightest, and the worst of every cell."""

import math
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.patches import Rectangle

from harness.records.finding import Finding
from harness.records.record import Record
from harness.report import things
from harness.report.figures import INK, Drawing, chart, legend, short
from harness.report.html import slug
from harness.report.markdown import code, escape, table
from harness.report.tables import mark, number

WORST = 5  # cases of a cell that are listed
# Shares of a budget, each with the colour of cells up to it: light to dark, and another hue beyond 1.
COLOURS = ((0.0, "#F2F6FA"), (0.25, "#D3E4F3"), (0.5, "#A9CCE6"), (0.75, "#7BB0D9"), (1.0, "#4B8CC4"), (math.inf, "#E07B39"))
LEAST, MOST = 1e-3, 1e3  # the plot's range, in budgets
FEW = 500  # findings that are drawn one by one, in the page's colours; more are a picture


class Spent(NamedTuple):
    """A finding of a record, and the budgets that it spends."""

    finding: Finding
    record: Record

    @property
    def order(self) -> tuple[bool, float]:
        """Return the key by which the tightest comes last."""
        return not self.finding.passed, self.finding.ratio


def spent(records: Iterable[Record]) -> list[Spent]:
    """Return all findings that are held to a budget, the tightest first."""
    found = [Spent(f, r) for r in records for f in r.findings if not f.measured]
    return sorted(found, key=lambda s: s.order, reverse=True)


def cell_title(check: str, implementation: str) -> str:
    """Return the heading of a cell's worst cases."""
    return f"{check}, {implementation}"


def heat_map(records: Sequence[Record], folder: Path) -> list[Drawing]:
    """Draw heat-map.svg: checks by implementations, each cell with passed/asked, the worst error, and a link to its cases."""
    asked = [r for r in records if r.status != "skip"]
    checks = _tightest_first(asked)
    who = sorted({(r.implementation, r.role) for r in asked}, key=lambda w: (w[1] == "rival", things.rank(w[0])))
    if not asked:
        return []
    with chart(folder, "heat-map", 1.5 + 0.85 * max(3, len(who)), 0.75 + 0.25 * len(checks)) as axes:
        for y, check in enumerate(checks):
            for x, (name, role) in enumerate(who):
                mine = [r for r in asked if (r.check, r.implementation, r.role) == (check, name, role)]
                if not mine:
                    continue
                tightest = spent(mine)[:1]
                share = tightest[0].finding.ratio if tightest else 0.0
                failed = any(r.failed for r in mine)
                fill = COLOURS[-1][1] if failed else next(colour for most, colour in COLOURS if share <= most)
                link = "#" + slug(cell_title(check, name))
                axes.add_patch(Rectangle((x - 0.48, y - 0.46), 0.96, 0.92, facecolor=fill, linewidth=0, url=link))
                said = f"{sum(r.status == 'pass' for r in mine):,}/{len(mine):,}"
                said += f"  {_share(share)}" if tightest and math.isfinite(share) and (share > 1 or not failed) else ""
                dark = fill == COLOURS[4][1]
                axes.text(x, y, said, ha="center", va="center", fontsize=7.5, color="#fefefe" if dark else "#111111", url=link)
        axes.set(xlim=(-0.5, max(3, len(who)) - 0.5), ylim=(len(checks) - 0.5, -0.5))
        names = [
            textwrap.fill(things.look(name).label, 13, break_long_words=False) + "\n(rival)" * (role == "rival")
            for name, role in who
        ]
        axes.set_xticks(range(len(who)), names, fontsize=8)
        axes.set_yticks(range(len(checks)), checks)
        axes.xaxis.tick_top()
        axes.tick_params(length=0)
        axes.grid(False)
        axes.spines[:].set_visible(False)
    caption = "Checks by implementations: answers passed / asked, and the largest error in budgets (0: exact; orange: failed)."
    return [Drawing(folder / "heat-map.svg", caption + " A cell leads to its worst cases.")]


def margins(records: Sequence[Record], folder: Path) -> list[Drawing]:
    """Draw margins.svg: every finding's error in budgets, a row for each check."""
    found = spent(records)
    inexact = [s for s in found if s.finding.ratio > 0]
    checks = _tightest_first([s.record for s in inexact])
    if not checks:
        return []
    drawn = np.random.default_rng(0)
    with chart(folder, "margins", 5.4, 1.2 + 0.3 * len(checks)) as axes:
        for y, check in enumerate(checks):
            exact = sum(s.record.check == check and s.finding.ratio == 0 for s in found)
            said = f"{exact:,} exact" if exact else ""
            axes.text(0.01, y - 0.36, said, transform=axes.get_yaxis_transform(), fontsize=7, color=INK)
        whose = {s.record.implementation: s.record.role for s in inexact}
        names = sorted(whose, key=lambda name: (whose[name] == "rival", things.rank(name)))
        for name in reversed(names):
            mine = [s for s in inexact if s.record.implementation == name]
            ratios = np.clip([s.finding.ratio for s in mine], LEAST, MOST)
            rows = np.array([checks.index(s.record.check) for s in mine]) + drawn.uniform(-0.3, 0.3, len(mine))
            look = things.look(name)
            few = len(inexact) <= FEW
            size, alpha = (4, 0.8) if few else (2, 0.5)
            axes.plot(ratios, rows, look.marker, color=look.colour, markersize=size, alpha=alpha, markeredgewidth=0,
                      rasterized=not few)  # fmt: skip
        axes.axvline(1, color=INK, linewidth=1)
        axes.set_xscale("log")
        most = max(s.finding.ratio for s in inexact)
        axes.set(xlim=(LEAST / 1.3, max(2.0, 1.3 * min(most, MOST))), ylim=(len(checks) - 0.4, -0.6))
        axes.set_yticks(range(len(checks)), checks)
        axes.xaxis.set_major_formatter(short)
        axes.set_xlabel("error in budgets; beyond the line it fails")
        legend(axes, [things.look(name) for name in names], columns=3, linewidth=0)
    caption = f"The error of each of {len(inexact):,} findings in budgets, by check."
    caption += f" {len(found) - len(inexact):,} more are exact." * (len(found) > len(inexact))
    if any(s.finding.ratio > MOST for s in inexact):
        caption += " At the right edge: larger ones, and errors where none is allowed."
    return [Drawing(folder / "margins.svg", caption)]


def tightest(records: Sequence[Record], most: int = 10) -> str:
    """Return the tightest findings of different tensors as a table."""
    groups: dict[tuple[object, ...], list[Spent]] = {}
    for s in spent(records):
        key = (s.finding.tensor, s.finding.norm, s.finding.ratio, s.record.subject, s.record.case, s.record.check)
        if s.finding.ratio > 0:
            groups.setdefault(key, []).append(s)
        if len(groups) > most:
            break
    return _table(list(groups.values())[:most])


def worst_of_cells(records: Sequence[Record]) -> str:
    """Return for every cell of the map its worst cases, below a heading of its own."""
    cells: dict[tuple[str, str], list[Record]] = {}
    for r in records:
        if r.status != "skip":
            cells.setdefault((r.check, r.implementation), []).append(r)
    parts = []
    for (check, name), mine in cells.items():
        found = [[s] for s in spent([*{id(r): r for r in mine}.values()])[:200]]
        cases: dict[str, list[Spent]] = {}
        for [s] in found:
            cases.setdefault(f"{s.record.subject} {s.record.case}", [s])
        answer = "All answers are exact." if found and not any(s.finding.ratio for [s] in found) else ""
        answer = answer or (_table(list(cases.values())[:WORST]) if cases else "No answer is a number.")
        parts.append(f"### {escape(cell_title(check, name))}\n\n{answer}")
    return "\n\n".join(parts)


def _tightest_first(records: Sequence[Record]) -> list[str]:
    """Return the checks of records, the one with the largest error in budgets first."""
    return list(dict.fromkeys([s.record.check for s in spent(records)] + [r.check for r in records]))


def _share(ratio: float) -> str:
    return "0" if ratio == 0 else f"{ratio:.2f}" if 0.01 <= ratio < 10 else number(ratio) if ratio >= 10 else "<.01"


def _table(groups: Sequence[Sequence[Spent]]) -> str:
    rows = []
    for group in groups:
        f, r = group[0]
        names = ", ".join(dict.fromkeys(s.record.implementation + mark(s.record) for s in group))
        where = str(tuple(f.worst)) if f.worst else "-"
        size = (number(f.error), number(f.budget), number(f.error / f.scale) if f.scale else "-")
        ratio = number(f.ratio) if math.isfinite(f.ratio) else "none allowed"
        rows.append(
            [ratio, f"{f.tensor} ({f.norm})", where, r.check, names, f"{r.subject} {r.case}", *size, code(r.command or "-")]
        )
    head = [
        "in budgets",
        "tensor (norm)",
        "worst element",
        "check",
        "implementation",
        "case",
        "error",
        "budget",
        "error / norm",
    ]
    return table([*head, "the command that asks it again"], rows) if rows else "None."
