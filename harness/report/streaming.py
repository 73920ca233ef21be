"""A stream: what the next frame costs after few frames and after many."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedFormatter, FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

from harness.records.speed import Speed
from harness.report.curves import fault_note, memory, seconds
from harness.report.figures import STYLE, colour, legend_below, save
from harness.report.markdown import table
from harness.report.speed_figures import DASHES, FINE, MARKERS, short
from harness.report.speed_tables import entry_name, milliseconds, notes, number

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
        kind = (entry_name(s.entry), p.way, f"{p['S']} px", p.dtype)
        rows.append((*kind, f"{p['A']:,}", milliseconds(s), high, rate, held, notes(s)))
    head = ["entry", "way", "frame", "dtype", "frames before", "ms a frame, median [95 %]", "ms, 99th percentile", "frames/s"]
    return table([*head, "peak MiB", "notes"], rows)


def draw(speeds: Iterable[Speed], folder: Path) -> list[Path]:
    """Draw stream.png and .svg in the folder: time and memory of a frame against those before it. Return their paths."""
    lines: dict[tuple[Any, ...], list[Speed]] = {}
    for s in speeds:
        if s.point.race == RACE and s.seconds:
            lines.setdefault((s.entry, s.point["S"], s.point.dtype, s.point.way), []).append(s)
    if not lines:
        return []
    places = {key: i for i, key in enumerate(dict.fromkeys(key[:3] for key in lines))}
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10.5, 4.4), layout="constrained")
        figure.suptitle("One more frame of a causal model's stream: medians, and above them the 99th percentiles")
        times, held = figure.subplots(1, 2, sharex=True)
        for key, line in lines.items():
            _line(times, held, places[key[:3]], sorted(line, key=lambda s: s.point["A"]))
        seen = sorted({s.point["A"] for line in lines.values() for s in line})
        for axes, title in ((times, "ms a frame"), (held, "peak memory (MiB)")):
            axes.set_xscale("log")
            axes.set_xlim(seen[0] / 1.6, seen[-1] * 1.6)
            axes.xaxis.set_major_locator(FixedLocator(seen))
            axes.xaxis.set_major_formatter(FixedFormatter([f"{n:,}" for n in seen]))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.grid(True, color="0.9")
            axes.set_axisbelow(True)
            axes.set(xlabel="frames that came before", ylabel=title)
        held.set_ylim(bottom=0)
        times.set_yscale("log")
        low, high = times.yaxis.get_view_interval()
        times.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low > 8 else FINE))
        times.yaxis.set_major_formatter(FuncFormatter(short))
        times.yaxis.set_minor_formatter(NullFormatter())
        legend_below(figure, _handles(lines, places))
        return save(figure, folder, RACE)


def _line(times: Axes, held: Axes, place: int, line: list[Speed]) -> None:
    """Draw medians with a stroke up to the 99th percentile, and memory."""
    look: dict[str, Any] = {
        "color": colour(place), "marker": MARKERS[place % len(MARKERS)], "linestyle": DASHES[line[0].point.way],
        "markersize": 5,
    }  # fmt: skip
    seen, middle = [s.point["A"] for s in line], [1e3 * seconds(s) for s in line]
    times.plot(seen, middle, **look)
    times.vlines(seen, middle, [1e3 * tail(s) for s in line], color=colour(place), linewidth=1)
    times.plot(seen, [1e3 * tail(s) for s in line], "_", color=colour(place), markersize=9)
    held.plot(seen, [(memory(s) or 0) / 2**20 for s in line], **look)


def _handles(lines: dict[tuple[Any, ...], list[Speed]], places: dict[tuple[Any, ...], int]) -> list[Line2D]:
    """Return a line for each entry, frame size and dtype; then the meaning of dashes."""
    handles = []
    for key, place in places.items():
        entry, side, dtype = key
        doubts = {fault_note(s) for k, line in lines.items() if k[:3] == key for s in line} - {""}
        label = ", ".join([entry.name, f"{side} px", dtype, *(d[:60].upper() for d in sorted(doubts))])
        handles.append(Line2D([], [], color=colour(place), marker=MARKERS[place % len(MARKERS)], label=label))
    ways = dict.fromkeys(key[3] for key in lines)
    return handles + [Line2D([], [], color="0.3", linestyle=DASHES[way], label=way) for way in ways]
