"""A stream: what the next frame costs after few frames and after many."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from harness.records.speed import WAYS, Speed
from harness.report import things, words
from harness.report.curves import fault_note, memory, seconds
from harness.report.figures import Drawing, End, chart, label_ends, line_look, ticks
from harness.report.markdown import sparse
from harness.report.speed_tables import milliseconds, notes, number

RACE = "stream"
HIGH = 0.99  # the quantile that is shown with the median


def tail(speed: Speed) -> float:
    """Return the seconds within which 99 of 100 frames are done."""
    return float(np.quantile(speed.seconds, HIGH))


def frames(speeds: Sequence[Speed]) -> str:
    """Return the times of a frame as a table."""
    rows = []
    for s in speeds:
        high = f"{number(1e3 * tail(s))} (n = {len(s.seconds)})" if s.seconds else "-"
        rate = number(s.point["B"] / seconds(s)) if s.seconds else "-"
        held = number((memory(s) or 0) / 2**20) if s.seconds else "-"
        p = s.point
        kind = (words.entry(s.entry), words.WAYS.get(p.way, p.way), f"{p['S']} px", p.dtype)
        rows.append((*kind, f"{p['A']:,}", milliseconds(s), high, rate, held, notes(s)))
    head = ["entry", "way", "frame", "dtype", "frames before", "ms a frame, median [95 %]", "ms, 99th percentile", "frames/s"]
    return sparse([*head, "peak MiB", "notes"], rows)


def draw(speeds: Iterable[Speed], folder: Path) -> list[Drawing]:
    """Draw for each way the time of a frame against those before it, and of the first way its memory.

    A way that was timed at one length alone has no figure, if another has one: its numbers are in the table.
    """
    timed = [s for s in speeds if s.point.race == RACE and s.seconds]
    ways = sorted({s.point.way for s in timed}, key=lambda way: way != "graph")
    ways = [way for way in ways if len({s.point["A"] for s in timed if s.point.way == way}) > 1] or ways[:1]
    drawn = [_draw([s for s in timed if s.point.way == way], way, "time", folder) for way in ways]
    return drawn + [_draw([s for s in timed if s.point.way == way], way, "memory", folder) for way in ways[:1]]


def _draw(speeds: Sequence[Speed], way: str, what: str, folder: Path) -> Drawing:
    """Draw a line for each model, frame size and dtype; strokes lead from medians to the 99th percentiles."""
    lines: dict[tuple[Any, ...], list[Speed]] = {}
    for s in speeds:
        lines.setdefault((s.entry, s.point["S"], s.point.dtype), []).append(s)
    stem, notes = f"{RACE}-{way}-{what}", sorted({fault_note(s)[:60] for s in speeds} - {""})
    with chart(folder, stem) as axes:
        ends = []
        for (entry, side, dtype), line in lines.items():
            line.sort(key=lambda s: s.point["A"])
            look = things.of(entry)._replace(label=f"{words.entry(entry)}, {dtype}" + f", {side} px" * (side != words.SIDE))
            seen = [s.point["A"] for s in line]
            value = [1e3 * seconds(s) if what == "time" else (memory(s) or 0) / 2**20 for s in line]
            axes.plot(seen, value, **line_look(look))
            if what == "time":
                axes.vlines(seen, value, [1e3 * tail(s) for s in line], color=look.colour, linewidth=1)
            ends.append(End(seen[-1], value[-1], look))
        axes.set(xscale="log", xlabel="frames that came before", ylabel="ms a frame" if what == "time" else "peak memory (MiB)")
        ticks(axes.xaxis, (s.point["A"] for s in speeds))
        axes.set_ylim(bottom=0)
        label_ends(axes, ends)
    shown = "medians, and strokes to the 99th percentiles" if what == "time" else what
    said = f"One more frame of a stream, {WAYS[way]}: {shown}"
    return Drawing(folder / f"{stem}.svg", "; ".join([said, *notes]) + ".")
