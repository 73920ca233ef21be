"""The plot of a run: how the error of the scan grows with the sequence, and its budget."""

import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from harness.judge.case import DTYPES
from harness.records.record import Record

CHECKS = ("forward", "backward")
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000")  # Okabe and Ito, for colour blindness
MARKERS = dict(zip(DTYPES, "osD^", strict=True))
DASHES = dict(zip(DTYPES, ((6, 3), (2, 2), (6, 2, 1, 2), (1, 3)), strict=True))
# The same records give the same file.
STYLE: dict[Any, Any] = {"svg.hashsalt": "parity", "svg.fonttype": "none", "font.size": 9, "text.parse_math": False}


def _panel_of(record: Record) -> str | None:
    """Return the panel of a record of the scan: `extremes` asks both questions, at its lengths."""
    if record.check == "extremes" and "-length-" in record.case:
        return "forward" if "-infer-" in record.case else "backward"
    return record.check if record.check in CHECKS else None


class _Point(NamedTuple):
    """A record's worst error and its budget at a length."""
    check: str
    implementation: str
    dtype: str
    length: int
    error: float  # as fractions of the truth's norm
    budget: float
    passed: bool


def error_against_length(records: Iterable[Record], folder: Path) -> list[Path]:
    """Draw error-vs-length.png and .svg in the folder. Return their paths; none if no record can be drawn."""
    drawable = [(r, _point(r)) for r in records]
    points = [p for _, p in drawable if p]
    if not points:
        return []
    names = list(dict.fromkeys(p.implementation for p in points))
    dtypes = [d for d in DTYPES if any(p.dtype == d for p in points)]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, 5.6), layout="constrained")
        lost = sum(r.failed and p is None and r.subject == "scan" and bool(_panel_of(r)) for r, p in drawable)
        figure.suptitle(
            "Selective scan: L2 error of the worst tensor against the float64 reference, RMS over the seeds"
            + f"\nNOT DRAWN, without a finite number: {lost} FAILED" * bool(lost)
        )
        panels = figure.subplots(1, len(CHECKS), sharex=True, sharey=True)
        for axes, check in zip(panels, CHECKS, strict=True):
            _panel(axes, [p for p in points if p.check == check], names, dtypes)
            axes.set(title=check, xlabel="sequence length L (tokens; implementations side by side)")
        panels[0].set_ylabel("error / norm of the truth (dimensionless)")
        failed = any(not p.passed for p in points)
        figure.legend(handles=_legend(names, dtypes, failed), loc="outside lower center", ncols=4, frameon=False)
        return save(figure, folder, "error-vs-length")


def save(figure: Figure, folder: Path, stem: str) -> list[Path]:
    """Write STEM.png and STEM.svg into the folder and return their paths; call it within STYLE."""
    paths = [folder / f"{stem}.{ending}" for ending in ("png", "svg")]
    for path in paths:
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else {})
    return paths


def legend_below(figure: Figure, handles: Sequence[Artist], most: int = 2) -> None:
    """Draw a legend under the panels, in as many columns as its longest label leaves room for."""
    lines = [line for handle in handles for line in str(handle.get_label()).splitlines()]
    columns = max(1, min(most, 125 // (max(map(len, lines)) + 12)))
    figure.set_figheight(figure.get_figheight() + 0.2 * math.ceil(len(lines) / columns))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, handlelength=4)


def colour(place: int) -> str:
    """Return the colour of the entry at an index."""
    return COLOURS[place % len(COLOURS)]


def _point(record: Record) -> _Point | None:
    """Return the worst tensor in l2: if any failed, the one with the most budgets spent, else the one with the largest error.

    The latter is returned in the case's dtype (a bfloat16 case also returns float32 gradients, whose budget is another).
    A log scale has no place for errors that are 0 or infinite: None.
    """
    length = re.search(r"(?:^|-)L(\d+)(?:-|$)", record.case)
    check = _panel_of(record)
    if record.subject != "scan" or check is None or not length or int(length[1]) == 0:
        return None
    found = [f for f in record.findings if f.norm == "l2" and f.scale > 0 and f.budget > 0 and f.error > 0]
    found = [f for f in found if math.isfinite(f.error / f.scale)]
    if not found or record.dtype not in DTYPES:
        return None
    worst = max(found, key=lambda f: (not f.passed, f.error / f.scale if f.passed else f.ratio))
    error, budget = worst.error / worst.scale, worst.budget / worst.scale
    return _Point(check, record.implementation, record.dtype, int(length[1]), error, budget, not record.failed)


def _panel(axes: Axes, points: list[_Point], names: list[str], dtypes: list[str]) -> None:
    """Draw a check's errors over the length, and the least budget of each dtype."""
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.grid(True, which="major", color="0.9")
    axes.set_axisbelow(True)
    for p in points:
        place = names.index(p.implementation)
        x = p.length * 1.07 ** (place - (len(names) - 1) / 2)  # side by side, or the last would hide the others
        look: dict[str, Any] = {"color": colour(place), "markersize": 5, "markeredgecolor": "white", "markeredgewidth": 0.4}
        axes.plot(x, p.error, MARKERS[p.dtype], **look)
        if not p.passed:
            axes.plot(x, p.error, "o", markersize=12, markerfacecolor="none", markeredgecolor="black")
    for dtype in dtypes:
        budgets: dict[int, float] = {}
        for p in points:
            if p.dtype == dtype and p.passed:  # what failed may be a tensor of another dtype; a ring says that it failed
                budgets[p.length] = min(p.budget, budgets.get(p.length, math.inf))
        if budgets:
            lengths = sorted(budgets)
            axes.plot(lengths, [budgets[n] for n in lengths], color="0.3", linewidth=1, dashes=DASHES[dtype])
    if not points:
        axes.text(0.5, 0.5, "nothing to draw", ha="center", transform=axes.transAxes)


def _legend(names: list[str], dtypes: list[str], failed: bool) -> list[Line2D]:
    """Return the legend of implementations, dtypes and failures."""
    lines = [Line2D([], [], color=colour(i), linewidth=5, label=name) for i, name in enumerate(names)]
    for d in dtypes:
        lines.append(Line2D([], [], color="0.3", marker=MARKERS[d], linewidth=0, label=d))
    for d in dtypes:
        lines.append(Line2D([], [], color="0.3", linewidth=1, dashes=DASHES[d], label=f"least budget, {d}"))
    if failed:
        ring = Line2D([], [], marker="o", linewidth=0, markersize=10, markerfacecolor="none", markeredgecolor="black")
        ring.set_label("FAILED")
        lines.append(ring)
    return lines
