"""How far the approximate online mode is from the exact result: against the size of a chunk, for every look-ahead."""

import re
from collections.abc import Iterable
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from harness.checks.forward_approximate import DEVIATION
from harness.records.record import Record
from harness.report.figures import STYLE, colour, save

STEM = "approximate"
Points = dict[int, dict[int, float]]  # frames looked ahead at -> frames of a chunk -> share of the norm


def approximate(records: Iterable[Record], folder: Path) -> list[Path]:
    """Draw approximate.png and .svg in the folder, of the first float32 record with deviations. Return their paths."""
    for record in records:
        points = measured(record) if record.dtype == "float32" and record.role == "ours" else {}
        if points:
            return _draw(record, points, folder)
    return []


def measured(record: Record) -> Points:
    """Return the deviations that a record holds."""
    points: Points = {}
    for f in record.findings:
        if f.norm == DEVIATION and f.scale > 0:
            chunk, ahead = map(int, re.findall(r"\d+", f.tensor))
            points.setdefault(ahead, {})[chunk] = f.error / f.scale
    return points


def _draw(record: Record, points: Points, folder: Path) -> list[Path]:
    """Draw a line for each look-ahead."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7, 4.6), layout="constrained")
        axes = figure.subplots()
        for place, (ahead, line) in enumerate(sorted(points.items())):
            chunks = sorted(line)
            label = "no look-ahead" if ahead == 0 else f"{ahead} frame{'s' * (ahead > 1)} ahead"
            axes.plot(chunks, [line[n] for n in chunks], "o-", color=colour(place), label=label)
        ticks = sorted({n for line in points.values() for n in line})
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [str(n) for n in ticks])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_ylim(bottom=0)
        axes.grid(True, color="0.9")
        axes.set_axisbelow(True)
        axes.set(xlabel="chunk (frames)", ylabel="distance from the exact tokens / their norm")
        axes.set_title(f"Approximate online mode\n{record.implementation}, {record.case}, drawn weights", fontsize="medium")
        axes.legend(frameon=False)
        return save(figure, folder, STEM)
