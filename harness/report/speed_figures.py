"""The plots of a benchmark run: models against the length of a clip, and operators against the roofline."""

import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedFormatter, FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

from harness.bench import grids
from harness.records.speed import Entry, Point, Speed
from harness.report.curves import MAMBA, VIT, Curve, Family, fault_note, median, meeting, memory
from harness.report.figures import STYLE, colour, legend_below, save

MARKERS = "osD^vP*Xhp"
DASHES: dict[str, Any] = {"eager": "solid", "graph": (0, (5, 2)), "compiled": (0, (1, 1.5))}
ENDS = {"oom": ("x", "ran out of memory"), "timeout": ("+", "ran out of time")}
HATCHES = ("", "////", "....", "xxxx", "----", "oooo")
WORDS = {"oom": "out of memory", "implied": "out of memory or time when shorter", "timeout": "out of time", "error": "FAILED"}
FINE = (1, 1.5, 2, 3, 4, 5, 6, 8)  # ticks within a decade
ROW = 0.17  # inches of a bar
Rate = Callable[[Speed, float], float]
TIMES: tuple[tuple[str, Rate], ...] = (
    ("latency (ms a call)", lambda s, t: 1e3 * t),
    ("clips/s", lambda s, t: s.point["B"] / t),
    ("tokens/s", lambda s, t: s.point.tokens / t),
)


def models(family: Family, folder: Path, kind: str) -> list[Path]:
    """Draw one family's latency, clips/s, tokens/s and peak memory (of this `kind`) against tokens; return the paths."""
    with matplotlib.rc_context(STYLE):
        shown = [c for c in family.curves if c.timed or c.ended]
        places = {entry: i for i, entry in enumerate(dict.fromkeys(c.entry for c in family.curves))}
        figure = Figure(figsize=(10.5, 7.4), layout="constrained")
        figure.suptitle(family.title + "\nmedians; bands are their 95 % intervals, mostly thinner than the line")
        panels = figure.subplots(2, 2, sharex=True)
        for axes, (title, rate) in zip(panels.flat, TIMES, strict=False):
            for curve in shown:
                _curve(axes, places, curve, rate)
            axes.set_ylabel(title)
        for curve in shown:
            line = [(s.point["L"], held / 2**30) for s in curve.timed if (held := memory(s))]
            panels[1, 1].plot([x for x, _ in line], [y for _, y in line], **_look(places, curve))
        panels[1, 1].set_ylabel(f"peak memory (GiB, {kind})")
        for axes in panels.flat:
            _axes(axes, places, shown)
        _meetings(panels[0, 0], family, places)
        for axes in panels[0]:
            _frames(axes, family)
        for axes in panels[1]:
            axes.set_xlabel("tokens a clip (L)")
        legend_below(figure, _handles(family, places, shown))
        return save(figure, folder, family.stem)


def _look(places: dict[Entry, int], curve: Curve) -> dict[str, Any]:
    """Return colour and marker by entry, hollow for a ViT, dashes by way."""
    place = places[curve.entry]
    return {
        "color": colour(place), "marker": MARKERS[place % len(MARKERS)], "linestyle": DASHES[curve.way], "linewidth": 1.3,
        "markersize": 5, "markerfacecolor": "white" if curve.entry.subject == VIT else colour(place),
    }  # fmt: skip


def _curve(axes: Axes, places: dict[Entry, int], curve: Curve, rate: Rate) -> None:
    """Draw a line with its band."""
    timed = [(s, median(s.seconds)) for s in curve.timed]
    lengths = [s.point["L"] for s, _ in timed]
    axes.plot(lengths, [rate(s, m.middle) for s, m in timed], **_look(places, curve))
    low, high = ([rate(s, getattr(m, end)) for s, m in timed] for end in ("low", "high"))
    axes.fill_between(lengths, low, high, color=colour(places[curve.entry]), alpha=0.25, linewidth=0)


def _axes(axes: Axes, places: dict[Entry, int], shown: Sequence[Curve]) -> None:
    """Set logarithmic axes, with a mark at the top edge where a curve ended; those of one length hang below each other."""
    empty = not any(np.size(line.get_xdata()) for line in axes.lines)
    axes.set(xscale="log", yscale="linear" if empty else "log")
    axes.grid(True, which="major", color="0.9")
    axes.set_axisbelow(True)
    lengths = [s.point["L"] for c in shown for s in c.speeds if s.seconds or s is c.ended]
    axes.set_xlim(min(lengths) / 1.25, max(lengths) * 1.25)
    for axis, most in ((axes.xaxis, 60), *([] if empty else [(axes.yaxis, 1e4)])):
        low, high = axis.get_view_interval()
        axis.set_major_locator(LogLocator(subs=(1,) if high / low > most else (1, 2, 5) if high / low > 8 else FINE))
        axis.set_major_formatter(FuncFormatter(short))
        axis.set_minor_formatter(NullFormatter())
    hung: dict[int, int] = {}
    for entry, length, status in dict.fromkeys((c.entry, c.ended.point["L"], c.ended.status) for c in shown if c.ended):
        depth = hung[length] = hung.get(length, -1) + 1
        look: dict[str, Any] = {"markersize": 8, "markeredgewidth": 2, "clip_on": False, "color": colour(places[entry])}
        axes.plot(length, 1 - 0.06 * depth, ENDS[status][0], transform=axes.get_xaxis_transform(), **look)


def short(x: float, _: object = None) -> str:
    """Return a number with k, M or G."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if x >= size:
            return f"{x / size:g}{letter}"
    return f"{x:g}"


def _meetings(axes: Axes, family: Family, places: dict[Entry, int]) -> None:
    """Draw a vertical line and its number where a VideoMamba meets the fastest ViT."""
    met = [(at, c) for c in family.of(MAMBA) if (at := meeting(family, c).at)]
    for i, (at, curve) in enumerate(sorted(met, key=lambda pair: pair[0])):
        axes.axvline(at, color=colour(places[curve.entry]), linestyle=DASHES[curve.way], linewidth=0.9)
        box = {"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none"}
        axes.text(
            at, 0.03 + 0.075 * i, tokens(at), transform=axes.get_xaxis_transform(), ha="center", bbox=box,
            color=colour(places[curve.entry]), fontweight="bold",
        )  # fmt: skip


def tokens(at: float) -> str:
    """Return a token count to three digits."""
    return f"{float(f'{at:.3g}'):,.0f}"


def _frames(axes: Axes, family: Family) -> None:
    """Set an axis of frames on top."""
    frames = sorted({(s.point["L"], s.point["T"]) for c in family.curves for s in c.speeds})
    low, high = axes.get_xlim()
    frames = [(length, T) for length, T in frames if low <= length <= high]
    top = axes.secondary_xaxis("top")
    top.xaxis.set_major_locator(FixedLocator([length for length, _ in frames]))
    top.xaxis.set_major_formatter(FixedFormatter([str(T) for _, T in frames]))
    top.xaxis.set_minor_locator(NullLocator())
    top.set_xlabel("frames (T)")


def _handles(family: Family, places: dict[Entry, int], shown: Sequence[Curve]) -> list[Line2D]:
    """Return a line for each entry, with where it meets the ViT; then the meaning of dashes and crosses."""
    several, handles = len(family.ways) > 1, []
    for entry in dict.fromkeys(c.entry for c in shown):
        mine = [c for c in shown if c.entry == entry]
        doubts = sorted({fault_note(s) for c in mine for s in c.timed} - {""})
        label = ", ".join([entry.name, *(d[:60].upper() for d in doubts[-1:])]) + _where(family, mine, several)
        look = _look(places, mine[0]) | ({"linestyle": "solid"} if several else {})
        handles.append(Line2D([], [], label=textwrap.fill(label, 115), **look))
    for way in family.ways if several else []:
        handles.append(Line2D([], [], color="0.3", linestyle=DASHES[way], linewidth=1.3, label=way))
    for status in dict.fromkeys(c.ended.status for c in shown if c.ended):
        marker, label = ENDS[status]
        handles.append(Line2D([], [], marker=marker, linewidth=0, color="0.2", markersize=8, markeredgewidth=2, label=label))
    return handles


def _where(family: Family, curves: Sequence[Curve], several: bool) -> str:
    """Return where a VideoMamba meets the fastest ViT, way by way."""
    found = [(c.way, m.at) for c in curves if c.entry.subject == MAMBA and (m := meeting(family, c)).lengths]
    met = [tokens(at) + f" ({way})" * several for way, at in found if at]
    missed = [way for way, at in found if not at]
    said = [f"meets the fastest ViT at {' and '.join(met)} tokens"] if met else []
    if missed:
        said.append("meets no ViT in this range" if not met else f"nowhere in this range ({', '.join(missed)})")
    return ": " * bool(said) + ", ".join(said)


def roofline(speeds: Iterable[Speed], folder: Path) -> list[Path]:
    """Draw bars: the share of the roofline that each implementation of an operator reaches. Return the paths."""
    operators = [s for s in speeds if s.point.race in grids.races("operators")]
    if not any(s.seconds and s.bound for s in operators):
        return []
    dtypes = list(dict.fromkeys(s.point.dtype for s in operators))
    by_row = {(sizes(s.point, len(dtypes) > 1), s.point.mode, s.entry.implementation): s for s in operators}
    labels, names = (list(dict.fromkeys(key[i] for key in by_row)) for i in (0, 2))
    modes = list(dict.fromkeys(mode for _, mode, _ in by_row))
    with matplotlib.rc_context(STYLE):
        count = len({(row, name) for row, _, name in by_row})
        figure = Figure(figsize=(10.5, 1.3 + ROW * (count + 0.7 * len(labels))), layout="constrained")
        figure.suptitle(f"Share of the roofline ({', '.join(dtypes)}): least time that the hardware needs / median time taken")
        panels = figure.subplots(1, len(modes), sharey=True, squeeze=False)[0]
        for axes, mode in zip(panels, modes, strict=True):
            _bars(axes, mode, labels, names, by_row)
        handles = [Patch(facecolor=colour(i), hatch=_hatch(i), edgecolor="white", label=n) for i, n in enumerate(names)]
        legend_below(figure, handles, most=4)
        return save(figure, folder, "roofline")


def _hatch(place: int) -> str:
    """Return the hatch of the entry at an index."""
    return HATCHES[place % len(HATCHES)]


def _bars(axes: Axes, mode: str, labels: list[str], names: list[str], by_row: dict[tuple[str, str, str], Speed]) -> None:
    """Draw the bars of a mode, a group for each point."""
    y, ticks = 0.0, []
    for label in labels:
        here = [n for n in names if any((label, m, n) in by_row for m in ("infer", "train"))]
        ticks.append(y + (len(here) - 1) / 2)
        for name in here:
            if speed := by_row.get((label, mode, name)):
                _bar(axes, y, names.index(name), speed)
            y += 1
        y += 0.7
    axes.axvline(100, color="black", linewidth=1)
    widest = max([100.0, *(_share(s) for (_, m, _), s in by_row.items() if m == mode)])
    axes.set(title=mode, xlabel="share of the roofline (%)", xlim=(0, 1.25 * widest), ylim=(y - 0.2, -1.2))
    axes.set_yticks(ticks, labels)
    axes.tick_params(axis="y", length=0)
    axes.grid(True, axis="x", color="0.9")
    axes.set_axisbelow(True)


def _bar(axes: Axes, y: float, place: int, speed: Speed) -> None:
    """Draw a bar with its number after it, or the word for why there is none."""
    share = _share(speed)
    if share:
        axes.barh(y, share, height=0.9, color=colour(place), hatch=_hatch(place), edgecolor="white", linewidth=0)
    text = f"{share:.2g} %" if share < 99.5 else f"{share:.0f} %"
    if not share:
        why = f"no bound: {speed.no_bound}" if speed.no_bound else "no bound known"
        text = why if speed.seconds else WORDS.get(speed.status, speed.status.upper())
    axes.text(share + 1, y, text + f" ({fault_note(speed)[:40]})" * bool(fault_note(speed)), va="center", fontsize=7)


def _share(speed: Speed) -> float:
    """Return per cent of the roofline; 0 for none."""
    return 100 * (speed.share or 0.0)


def sizes(point: Point, with_dtype: bool = False) -> str:
    """Return an operator's point without its mode."""
    return " ".join([point.race, *(f"{k}{v}" for k, v in point.dims), *([point.dtype] if with_dtype else [])])
