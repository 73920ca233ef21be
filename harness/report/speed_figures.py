"""The figures of models against the length of a clip, and of operators against the roofline."""

import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

from harness.bench import grids
from harness.records.speed import WAYS, Point, Speed
from harness.report import things, words
from harness.report.curves import MAMBA, Curve, Family, fault_note, meeting, memory, seconds
from harness.report.figures import INK, Drawing, End, chart, hidden, label_ends, legend, line_look, logarithmic

WORDS = {
    "oom": "out of memory", "implied": "out of memory or time when shorter", "timeout": "out of time", "error": "failed",
    "gated": "not timed: failed parity",
}  # fmt: skip
MOST = 5  # lines of a panel
NEAR = 1.6  # a vertical line less than so many times to the right leaves no room for a number
Value = Callable[[Speed], float]
LATENCY: tuple[str, Value] = "ms a call", lambda s: 1e3 * seconds(s)


def models(family: Family, folder: Path, kind: str) -> tuple[list[Drawing], list[Drawing]]:
    """Draw a family's latency and peak memory (of this `kind`) in its main way; and, to be folded, the rest.

    The rest is tokens a second in the main way, and latency in the other ways.
    """
    first, *others = sorted(family.ways, key=lambda way: way != family.main_way)
    held: tuple[str, Value] = f"peak memory (GiB, {kind})", lambda s: (memory(s) or 0) / 2**30
    rate: tuple[str, Value] = "tokens/s", lambda s: s.point.tokens / seconds(s)
    main = [latency(family, folder), _draw(family, first, *held, "-memory", folder)]
    rest = [_draw(family, first, *rate, "-tokens", folder)]
    return main, rest + [_draw(family, way, *LATENCY, f"-{way}", folder) for way in others]


def latency(family: Family, folder: Path) -> Drawing:
    """Draw a family's time of a call in its main way."""
    return _draw(family, family.main_way, *LATENCY, "", folder)


def _draw(family: Family, way: str, what: str, value: Value, suffix: str, folder: Path) -> Drawing:
    """Draw a line for each of the first entries that are run in a way."""
    every = [c for c in family.curves if c.way == way and (c.timed or c.ended)]
    every.sort(key=lambda c: things.rank(c.entry.implementation, c.entry.subject))
    shown, lines, ends = every[:MOST], [], []
    stem = family.stem + suffix
    with chart(folder, stem) as axes:
        for curve in shown:
            look = things.of(curve.entry)
            line = {s.point["L"]: value(s) for s in curve.timed if value(s) > 0}
            lines.append((look.label, {float(x): y for x, y in line.items()}))
            if line:
                axes.plot(list(line), list(line.values()), **line_look(look))
                ends.append(End(*list(line.items())[-1], look))
        axes.set(xlabel="tokens a clip", ylabel=what, xscale="log", yscale="log" if ends else "linear")
        lengths = [s.point["L"] for c in shown for s in c.speeds if s.seconds or s is c.ended]
        axes.set_xlim(min(lengths) / 1.15, max(lengths) * 1.15)
        for axis in (axes.xaxis, axes.yaxis) if ends else (axes.xaxis,):
            logarithmic(axis)
        for curve in shown:
            if curve.ended:
                axes.plot(curve.ended.point["L"], 1, "x", color=things.of(curve.entry).colour, markersize=8, markeredgewidth=2,
                          clip_on=False, transform=axes.get_xaxis_transform())  # fmt: skip
        met = what == "ms a call" and _meetings(axes, family, shown)
        _frames(axes, family)
        label_ends(axes, ends)
    said = [f"{family.title}: {what}, {WAYS[way]}"]
    said += ["vertical lines: where VideoMamba meets the fastest ViT, in tokens"] * bool(met)
    said += [f"x: {WORDS[c.ended.status]} ({things.of(c.entry).label})" for c in shown if c.ended]
    said += [f"{things.of(c.entry).label}: {note[:60]}" for c in shown if (note := max(map(fault_note, c.timed), default=""))]
    said += hidden(lines)
    if left := [things.of(c.entry).label for c in every[MOST:]]:
        said.append(f"in the tables alone: {', '.join(left)}")
    return Drawing(folder / f"{stem}.svg", "; ".join(said) + ".")


def _meetings(axes: Axes, family: Family, shown: Sequence[Curve]) -> bool:
    """Draw a vertical line and its number where a VideoMamba meets the fastest ViT; return whether there is one.

    A number is at the right of its line, or at its left where another line is near at the right.
    """
    met = [(at, things.of(c.entry)) for c in shown if c.entry.subject == MAMBA and (at := meeting(family, c).at)]
    met.sort(key=lambda pair: pair[0])
    for i, (at, look) in enumerate(met):
        crowded = i + 1 < len(met) and met[i + 1][0] / at < NEAR
        axes.axvline(at, color=look.colour, linewidth=0.8)
        axes.text(at, 0.02 + 0.075 * i, f" {tokens(at)} ", transform=axes.get_xaxis_transform(), color=look.colour, fontsize=8,
                  ha="right" if crowded else "left")  # fmt: skip
    return bool(met)


def _frames(axes: Axes, family: Family) -> None:
    """Set an axis of frames on top."""
    frames = sorted({(s.point["L"], s.point["T"]) for c in family.curves for s in c.speeds})
    low, high = axes.get_xlim()
    frames = [(length, T) for length, T in frames if low <= length <= high]
    top = axes.secondary_xaxis("top")
    top.xaxis.set_major_locator(FixedLocator([length for length, _ in frames]))
    top.xaxis.set_major_formatter(FixedFormatter([str(T) for _, T in frames]))
    top.xaxis.set_minor_locator(NullLocator())
    top.set_xlabel("frames")


def tokens(at: float) -> str:
    """Return a token count to three digits."""
    return f"{float(f'{at:.3g}'):,.0f}"


def operators(speeds: Iterable[Speed], folder: Path) -> list[Drawing]:
    """Draw the times of operators, a figure a mode, then for each mode the shares of the roofline that they reach."""
    races = grids.races("operators")
    mine = [s for s in speeds if s.point.race in races]
    modes = dict.fromkeys(s.point.mode for s in mine)
    several = len({s.point.dtype for s in mine}) > 1
    timed = [mode for mode in modes if any(s.seconds and s.point.mode == mode for s in mine)]
    bounded = [mode for mode in modes if any(s.seconds and s.bound and s.point.mode == mode for s in mine)]
    drawn = [_times([s for s in mine if s.point.mode == mode], mode, several, folder) for mode in timed]
    return drawn + [_shares([s for s in mine if s.point.mode == mode], mode, several, folder) for mode in bounded]


def _times(speeds: Sequence[Speed], mode: str, with_dtype: bool, folder: Path) -> Drawing:
    """Draw the time of every entry, a row a point."""
    stem = f"operators-{mode}"
    with _rows(speeds, with_dtype, stem, folder) as (axes, place):
        for s in speeds:
            if s.seconds:
                axes.plot(1e3 * seconds(s), place[s.point], **line_look(things.of(s.entry)) | {"zorder": 2 + _front(s)})
        axes.set(xscale="log", xlabel="ms a call")
        logarithmic(axes.xaxis)
    said = [f"{words.MODES[mode].capitalize()}: medians; further left is faster"]
    said += [*_reasons((s, WORDS.get(s.status, s.status)) for s in speeds if not s.seconds), *_notes(speeds)]
    return Drawing(folder / f"{stem}.svg", "; ".join(said) + ".")


def _shares(speeds: Sequence[Speed], mode: str, with_dtype: bool, folder: Path) -> Drawing:
    """Draw the share of the roofline that every entry reaches, a row a point."""
    stem = f"roofline-{mode}"
    with _rows(speeds, with_dtype, stem, folder) as (axes, place):
        for s in speeds:
            if s.share:
                axes.plot(100 * s.share, place[s.point], **line_look(things.of(s.entry)) | {"zorder": 2 + _front(s)})
        axes.axvline(100, color=INK, linewidth=1)
        axes.set(xlabel="share of the roofline (%)", xlim=(0, 103))
    said = [f"{words.MODES[mode].capitalize()}: least time that the hardware needs / median time; 100 % cannot be beaten"]
    said += _reasons((s, f"no bound: {s.no_bound}") for s in speeds if s.no_bound)
    return Drawing(folder / f"{stem}.svg", "; ".join([*said, *_notes(speeds)]) + ".")


@contextmanager
def _rows(speeds: Sequence[Speed], with_dtype: bool, stem: str, folder: Path) -> Iterator[tuple[Axes, dict[Point, int]]]:
    """Draw a panel with a row a point, named in words, and a legend; give the axes and the rows by point."""
    names = {s.point: textwrap.fill(words.point(s.point, with_dtype, with_way=True), 34) for s in speeds}
    rows = list(dict.fromkeys(names.values()))
    lines = sum(1 + name.count("\n") for name in rows)
    with chart(folder, stem, 5.4, 1.2 + 0.14 * lines + 0.1 * len(rows)) as axes:
        yield axes, {point: rows.index(name) for point, name in names.items()}
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_yticks(range(len(rows)), rows, fontsize=7.5)
        axes.tick_params(axis="y", length=0)
        looks = {things.of(s.entry): _front(s) for s in speeds if s.seconds}
        legend(axes, sorted(looks, key=lambda look: (-looks[look], look.label)), columns=3, linewidth=0)


def _front(speed: Speed) -> float:
    """Return how far in front of others a marker is drawn: the preferred one hides others."""
    return 1 / (1 + things.rank(speed.entry.implementation, speed.entry.subject))


def _reasons(without: Iterable[tuple[Speed, str]]) -> list[str]:
    """Return why entries have no marker, with the number of points."""
    why = Counter((things.of(s.entry).label, reason) for s, reason in without)
    return [f"{label}: {reason}" + f" ({n} points)" * (n > 1) for (label, reason), n in why.items()]


def _notes(speeds: Iterable[Speed]) -> list[str]:
    """Return the marks on times, once each."""
    return list(dict.fromkeys(f"{things.of(s.entry).label}: {fault_note(s)[:60]}" for s in speeds if fault_note(s)))
