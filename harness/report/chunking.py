"""Videos in chunks: throughput against peak memory, compared with one pass over the whole video."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from harness.records.speed import Entry, Point, Speed
from harness.report.curves import fault_note, memory, seconds
from harness.report.figures import STYLE, colour, legend_below, save
from harness.report.markdown import table
from harness.report.speed_figures import FINE, MARKERS, WORDS, short
from harness.report.speed_tables import entry_name, milliseconds, notes, number

RACE = "chunks"
WHOLE = {"eager": "all at once", "checkpointed": "all at once, checkpointed"}


def passes(speeds: Sequence[Speed]) -> str:
    """Return a table of the time and memory of every pass."""
    full_passes = {_video(s): s for s in speeds if s.point.way in WHOLE}
    rows = []
    for s in speeds:
        p, other = s.point, full_passes.get(_video(s))
        size = WHOLE.get(p.way) or str(p["F"])
        rate, held, share = "-", "-", "-"
        if s.seconds:
            rate, held = number(p["B"] * p["T"] / seconds(s)), number((memory(s) or 0) / 2**30)
            if other and other.seconds and other is not s and memory(other):
                share = f"{seconds(s) / seconds(other):.3g}, {(memory(s) or 0) / (memory(other) or 1):.3g}"
        video = f"{p['B']} x {p['T']:,} x {p['S']} px, {p.dtype}"
        rows.append((video, f"{p['L']:,}", p.mode, size, entry_name(s.entry), milliseconds(s), rate, held, share, notes(s)))
    head = ["clips x frames", "tokens", "mode", "frames at a time", "entry", "ms, median [95 %]", "frames/s", "peak GiB"]
    return table([*head, "time, memory / whole's", "notes"], rows)


def _video(speed: Speed) -> tuple[Any, ...]:
    """Return the key that all passes over a video share."""
    p = speed.point
    return speed.entry, p["B"], p["T"], p["S"], p.mode, p.dtype


def draw(speeds: Iterable[Speed], folder: Path) -> list[Path]:
    """Draw chunks.png and .svg in the folder: a line a video, a point a chunk length. Return their paths."""
    mine = [s for s in speeds if s.point.race == RACE]
    if not any(s.seconds for s in mine):
        return []
    modes = list(dict.fromkeys(s.point.mode for s in mine))
    kinds = list(dict.fromkeys(_kind(s.entry, s.point) for s in mine))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10.5, 4.8), layout="constrained")
        figure.suptitle("Videos in chunks: the numbers are frames at a time; a hollow point is the whole video at once")
        panels = figure.subplots(1, len(modes), squeeze=False)[0]
        for axes, mode in zip(panels, modes, strict=True):
            for place, kind in enumerate(kinds):
                _line(axes, place, [s for s in mine if s.point.mode == mode and _kind(s.entry, s.point) == kind])
            _axes(axes, mode)
        legend_below(figure, [_handle(i, kind, mine) for i, kind in enumerate(kinds)])
        return save(figure, folder, RACE)


def _kind(entry: Entry, point: Point) -> tuple[Entry, int, int, int, str]:
    """Return the key of the line to which a point belongs."""
    return entry, point["B"], point["T"], point["S"], point.dtype


def _line(axes: Axes, place: int, mine: list[Speed]) -> None:
    """Draw memory and throughput by length of a chunk, and those of the pass over the whole video."""
    timed = [s for s in mine if s.seconds and memory(s)]
    cut = sorted((s for s in timed if s.point.way not in WHOLE), key=lambda s: s.point["F"])
    look: dict[str, Any] = {"color": colour(place), "marker": MARKERS[place % len(MARKERS)], "linewidth": 1.3, "markersize": 6}
    spots = {id(s): ((memory(s) or 0) / 2**30, s.point["B"] * s.point["T"] / seconds(s)) for s in timed}
    if cut:
        axes.plot(*zip(*(spots[id(s)] for s in cut), strict=True), **look)
    for s in timed:
        if s.point.way in WHOLE:
            axes.plot(*spots[id(s)], **look | {"markerfacecolor": "white", "markersize": 9, "linewidth": 0})
        text = "whole" if s.point.way in WHOLE else str(s.point["F"])
        axes.annotate(text, spots[id(s)], (0, 7), textcoords="offset points", ha="center", fontsize=8, color=colour(place))


def _axes(axes: Axes, mode: str) -> None:
    """Set a logarithmic axis for memory, and one from 0 for throughput."""
    axes.set(title=mode, xlabel="peak memory (GiB)", ylabel="frames/s")
    rates = [float(y) for line in axes.lines for y in np.ravel(line.get_ydata())]
    if rates:
        axes.set_xscale("log")
        axes.margins(x=0.12)
        low, high = axes.xaxis.get_view_interval()
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low > 8 else FINE))
        axes.xaxis.set_major_formatter(FuncFormatter(short))
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_ylim(0, 1.15 * max(rates, default=1.0))  # room for the numbers
    axes.grid(True, color="0.9")
    axes.set_axisbelow(True)


def _handle(place: int, kind: tuple[Entry, int, int, int, str], speeds: list[Speed]) -> Line2D:
    """Return the legend's entry of a video, with its passes that have no time."""
    entry, B, T, S, dtype = kind
    mine = [s for s in speeds if _kind(s.entry, s.point) == kind]
    lost = [
        f"{s.point.mode}, {WHOLE.get(s.point.way) or 'chunks of ' + str(s.point['F'])}: {WORDS.get(s.status, s.status.upper())}"
        for s in mine if not s.seconds
    ]  # fmt: skip
    doubts = sorted({fault_note(s)[:60].upper() for s in mine} - {""})
    label = "; ".join([f"{entry.name}, {B} x {T:,} frames of {S} px, {dtype}", *lost, *doubts])
    return Line2D([], [], color=colour(place), marker=MARKERS[place % len(MARKERS)], linewidth=1.3, label=label)
