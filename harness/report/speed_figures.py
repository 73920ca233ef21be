"""The figures of models against the length of a clip, and of operators against the roofline."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

from harness.bench import grids
from harness.records.speed import WAYS, Point, Speed
from harness.report import things
from harness.report.curves import MAMBA, Curve, Family, fault_note, meeting, memory, seconds
from harness.report.figures import HEIGHT, INK, Drawing, End, chart, hidden, label_ends, legend, line_look, logarithmic

WORDS = {
    "oom": "out of memory", "implied": "out of memory or time when shorter", "timeout": "out of time", "error": "failed",
    "gated": "not timed: failed parity",
}  # fmt: skip
MOST = 5  # lines of a panel
Value = Callable[[Speed], float]


def models(family: Family, folder: Path, kind: str) -> tuple[list[Drawing], list[Drawing]]:
    """Draw a family's latency and peak memory (of this `kind`) in its main way; and, to be folded, the rest.

    The rest is tokens a second in the main way, and latency in the other ways.
    """
    first, *others = sorted(family.ways, key=lambda way: way != family.main_way)
    latency: tuple[str, Value] = "ms a call", lambda s: 1e3 * seconds(s)
    held: tuple[str, Value] = f"peak memory (GiB, {kind})", lambda s: (memory(s) or 0) / 2**30
    rate: tuple[str, Value] = "tokens/s", lambda s: s.point.tokens / seconds(s)
    main = [_draw(family, first, *latency, "", folder), _draw(family, first, *held, "-memory", folder)]
    rest = [_draw(family, first, *rate, "-tokens", folder)]
    return main, rest + [_draw(family, way, *latency, f"-{way}", folder) for way in others]


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
        if what == "ms a call":
            _meetings(axes, family, shown)
        _frames(axes, family)
        label_ends(axes, ends)
    said = [f"{family.title}: {what}, {WAYS[way]}"]
    said += [f"x: {WORDS[c.ended.status]} ({things.of(c.entry).label})" for c in shown if c.ended]
    said += [f"{things.of(c.entry).label}: {note[:60]}" for c in shown if (note := max(map(fault_note, c.timed), default=""))]
    said += hidden(lines)
    if left := [things.of(c.entry).label for c in every[MOST:]]:
        said.append(f"in the tables alone: {', '.join(left)}")
    return Drawing(folder / f"{stem}.svg", "; ".join(said) + ".")


def _meetings(axes: Axes, family: Family, shown: Sequence[Curve]) -> None:
    """Draw a vertical line and its number where a VideoMamba meets the fastest ViT."""
    met = [(at, c) for c in shown if c.entry.subject == MAMBA and (at := meeting(family, c).at)]
    for i, (at, curve) in enumerate(sorted(met, key=lambda pair: pair[0])):
        colour = things.of(curve.entry).colour
        axes.axvline(at, color=colour, linewidth=0.8)
        axes.text(at, 0.02 + 0.075 * i, f" {tokens(at)}", transform=axes.get_xaxis_transform(), color=colour, fontsize=8)


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


def roofline(speeds: Iterable[Speed], folder: Path) -> list[Drawing]:
    """Draw for each mode the share of the roofline that each implementation of an operator reaches at every point."""
    races = grids.races("operators")
    operators = [s for s in speeds if s.point.race in races]
    if not any(s.seconds and s.bound for s in operators):
        return []
    several = len({s.point.dtype for s in operators}) > 1
    return [
        _shares([s for s in operators if s.point.mode == mode], mode, several, folder)
        for mode in dict.fromkeys(s.point.mode for s in operators)
    ]


def _shares(speeds: Sequence[Speed], mode: str, with_dtype: bool, folder: Path) -> Drawing:
    """Draw a row for each point."""
    rows = list(dict.fromkeys(sizes(s.point, with_dtype) for s in speeds))
    height = max(HEIGHT, 1.2 + 0.2 * len(rows))
    notes = dict.fromkeys(f"{things.of(s.entry).label}: {fault_note(s)[:60]}" for s in speeds if fault_note(s))
    with chart(folder, f"roofline-{mode}", 5.4, height) as axes:
        untimed: dict[int, list[str]] = {}
        for s in sorted(speeds, key=lambda s: -things.rank(s.entry.implementation)):
            y, look = rows.index(sizes(s.point, with_dtype)), things.of(s.entry)
            if s.share:
                axes.plot(100 * s.share, y, **line_look(look))
            elif not s.seconds or s.no_bound:
                why = f"no bound: {s.no_bound}" if s.seconds else WORDS.get(s.status, s.status)
                untimed.setdefault(y, []).append(f"{look.label} {why}")
        for y, said in untimed.items():
            axes.text(1, y - 0.28, "; ".join(said), fontsize=6.5, color=INK, va="bottom")
        axes.axvline(100, color=INK, linewidth=1)
        axes.set(xlabel="share of the roofline (%)", xlim=(0, 103), ylim=(len(rows) - 0.4, -0.9))
        axes.set_yticks(range(len(rows)), rows, fontsize=7.5)
        axes.tick_params(axis="y", length=0)
        looks = sorted({things.of(s.entry) for s in speeds}, key=lambda look: look.label)
        legend(axes, looks, columns=2, linewidth=0)
    said = [f"Operators, {mode}: least time that the hardware needs / median time taken; 100 % cannot be beaten", *notes]
    return Drawing(folder / f"roofline-{mode}.svg", "; ".join(said) + ".")


def sizes(point: Point, with_dtype: bool = False) -> str:
    """Return an operator's point without its mode."""
    return " ".join([point.race, *(f"{k}{v}" for k, v in point.dims), *([point.dtype] if with_dtype else [])])
