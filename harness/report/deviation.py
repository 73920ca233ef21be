"""How far the approximate online mode is from the exact result: against the size of a chunk, for every look-ahead."""

import re
from collections.abc import Iterable
from pathlib import Path

from harness.checks.forward_approximate import DEVIATION
from harness.records.record import Record
from harness.report.figures import Drawing, End, chart, label_ends, line_look, ticks
from harness.report.things import SPARE, Look

STEM = "approximate"
Points = dict[int, dict[int, float]]  # frames looked ahead at -> frames of a chunk -> share of the norm


def approximate(records: Iterable[Record], folder: Path) -> list[Drawing]:
    """Draw approximate.svg in the folder, of the first float32 record with deviations."""
    for record in records:
        points = measured(record) if record.dtype == "float32" and record.role == "ours" else {}
        if points:
            return [_draw(record, points, folder)]
    return []


def measured(record: Record) -> Points:
    """Return the deviations that a record holds."""
    points: Points = {}
    for f in record.findings:
        if f.norm == DEVIATION and f.scale > 0:
            chunk, ahead = map(int, re.findall(r"\d+", f.tensor))
            points.setdefault(ahead, {})[chunk] = f.error / f.scale
    return points


def _draw(record: Record, points: Points, folder: Path) -> Drawing:
    """Draw a line for each look-ahead."""
    with chart(folder, STEM) as axes:
        ends = []
        for (ahead, line), (colour, marker) in zip(sorted(points.items()), SPARE, strict=False):
            chunks = sorted(line)
            look = Look("no look-ahead" if ahead == 0 else f"{ahead} frame{'s' * (ahead > 1)} ahead", colour, marker)
            axes.plot(chunks, [line[n] for n in chunks], **line_look(look))
            ends.append(End(chunks[-1], line[chunks[-1]], look))
        axes.set_xscale("log", base=2)
        ticks(axes.xaxis, (n for line in points.values() for n in line))
        axes.set_ylim(bottom=0)
        axes.set(xlabel="frames of a chunk", ylabel="distance from the exact tokens / their norm")
        label_ends(axes, ends)
    return Drawing(folder / f"{STEM}.svg", f"Approximate online mode: {record.implementation}, {record.case}, drawn weights")
