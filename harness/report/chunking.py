"""Videos in chunks: throughput against peak memory, compared with one pass over the whole video."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from harness.records.speed import Speed
from harness.report import things, words
from harness.report.curves import fault_note, memory, seconds
from harness.report.figures import Drawing, chart, legend, line_look, logarithmic
from harness.report.markdown import sparse
from harness.report.speed_figures import WORDS
from harness.report.speed_tables import milliseconds, notes, number

RACE = "chunks"
WHOLE = {"eager": "all at once", "checkpointed": "all at once, checkpointed"}


def passes(speeds: Sequence[Speed]) -> str:
    """Return a table of the time and memory of every pass."""
    full_passes = {video(s): s for s in speeds if s.point.way in WHOLE}
    rows = []
    for s in speeds:
        p, other = s.point, full_passes.get(video(s))
        size = WHOLE.get(p.way) or str(p["F"])
        rate, held, slower, smaller = "-", "-", "-", "-"
        if s.seconds:
            rate, held = number(p["B"] * p["T"] / seconds(s)), number((memory(s) or 0) / 2**30)
            if other and other.seconds and other is not s and memory(other):
                slower, smaller = f"{seconds(s) / seconds(other):.3g}", f"{(memory(s) or 0) / (memory(other) or 1):.3g}"
        what = (words.clips(p["B"], p["T"], p["S"]), f"{p['L']:,}", p.dtype, words.MODES[p.mode], size, words.entry(s.entry))
        rows.append((*what, milliseconds(s), rate, held, slower, smaller, notes(s)))
    head = ["video", "tokens", "dtype", "mode", "frames at a time", "entry", "ms, median [95 %]", "frames/s", "peak GiB"]
    return sparse([*head, "time / whole's", "memory / whole's", "notes"], rows)


def video(speed: Speed) -> tuple[Any, ...]:
    """Return the key that all passes over a video share."""
    p = speed.point
    return speed.entry, p["B"], p["T"], p["S"], p.mode, p.dtype


def draw(speeds: Iterable[Speed], folder: Path) -> list[Drawing]:
    """Draw for each mode and length of a video its passes: frames a second against peak memory, a point a chunk length.

    A pass alone has no figure: its numbers are in the table.
    """
    panels: dict[tuple[str, int], list[Speed]] = {}
    for s in speeds:
        if s.point.race == RACE:
            panels.setdefault((s.point.mode, s.point["T"]), []).append(s)
    return [_draw(mine, *key, folder) for key, mine in panels.items() if sum(bool(memory(s)) for s in mine) > 1]


def _draw(speeds: Sequence[Speed], mode: str, T: int, folder: Path) -> Drawing:
    """Draw a line for each entry, frame size and dtype, with the frames at a time beside its points."""
    lines: dict[tuple[Any, ...], list[Speed]] = {}
    for s in speeds:
        lines.setdefault((s.entry, s.point["B"], s.point["S"], s.point.dtype), []).append(s)
    stem, looks = f"{RACE}-{mode}-T{T}", []
    with chart(folder, stem) as axes:
        for (entry, B, S, dtype), mine in lines.items():
            look = things.of(entry)._replace(label=f"{words.entry(entry)}, {words.clips(B, T, S)}, {dtype}")
            looks.append(look)
            timed = [s for s in mine if s.seconds and memory(s)]
            cut = sorted((s for s in timed if s.point.way not in WHOLE), key=lambda s: s.point["F"])
            spots = {id(s): ((memory(s) or 0) / 2**30, B * T / seconds(s)) for s in timed}
            if cut:
                axes.plot(*zip(*(spots[id(s)] for s in cut), strict=True), **line_look(look))
            for s in timed:
                whole = s.point.way in WHOLE
                if whole:
                    axes.plot(*spots[id(s)], look.marker, color=look.colour, fillstyle="none", markersize=9)
                text = "whole" if whole else str(s.point["F"])
                axes.annotate(
                    text, spots[id(s)], (-3, 7), textcoords="offset points", ha="right", fontsize=8, color=look.colour
                )
        axes.set(xscale="log", xlabel="peak memory (GiB)", ylabel="frames/s")
        axes.margins(x=0.15)
        logarithmic(axes.xaxis)
        axes.set_ylim(
            0, 1.15 * max(float(y) for line in axes.lines for y in np.ravel(line.get_ydata()))
        )  # room for the numbers
        legend(axes, looks, columns=1)
    what = "numbers are frames at a time; a hollow point is the whole video at once"
    said = [f"A video of {T:,} frames, {words.MODES[mode]}: {what}"]
    said += [f"{WHOLE.get(s.point.way) or 'chunks of ' + str(s.point['F'])}: {WORDS.get(s.status, s.status)}"
             for s in speeds if not s.seconds]  # fmt: skip
    said += sorted({fault_note(s)[:60] for s in speeds} - {""})
    return Drawing(folder / f"{stem}.svg", "; ".join(said) + ".")
