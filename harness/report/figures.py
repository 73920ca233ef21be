"""The frame of all figures: their size and style, axes, labels at the ends of lines, and files that are the same each time."""

import itertools
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedFormatter, FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

from harness.report.things import Look

INK, PAPER, GRID = "#1a1a1a", "#ffffff", "#e0e0e0"  # a page replaces them by its own, light or dark
FINE = (1, 1.5, 2, 3, 4, 5, 6, 8)  # ticks within a decade
# The same records give the same file; text stays text. The width is that of a phone's screen at its own scale.
STYLE: dict[Any, Any] = {
    "svg.hashsalt": "parity", "svg.fonttype": "none", "font.size": 9, "text.parse_math": False, "text.color": INK,
    "axes.edgecolor": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK, "axes.facecolor": PAPER,
    "figure.facecolor": PAPER, "savefig.facecolor": PAPER, "grid.color": GRID, "axes.grid": True, "axes.axisbelow": True,
    "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": "medium", "legend.frameon": False,
    "lines.linewidth": 1.6, "lines.markersize": 5,
}  # fmt: skip
WIDTH, HEIGHT = 4.9, 3.4  # inches
LETTERS = 14  # of a legend to an inch


class Drawing(NamedTuple):
    """A figure's file, and what it shows in words."""

    path: Path
    caption: str


class End(NamedTuple):
    """The last point of a line, and its look."""

    x: float
    y: float
    look: Look


@contextmanager
def chart(folder: Path, stem: str, width: float = WIDTH, height: float = HEIGHT) -> Iterator[Axes]:
    """Draw one panel and write it to STEM.svg in the folder."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure.subplots()
        nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
        figure.savefig(folder / f"{stem}.svg", dpi=150, metadata=nothing)


def shown(drawings: Iterable[Drawing]) -> str:
    """Return drawings as Markdown, a paragraph each."""
    return "\n\n".join(f"![{d.caption}]({d.path.name})" for d in drawings)


def line_look(look: Look) -> dict[str, Any]:
    """Return the options of a line."""
    size = {"markersize": 8.0} if look.marker == "*" else {}  # a star is mostly gaps
    return {"color": look.colour, "marker": look.marker, "markeredgecolor": PAPER, "markeredgewidth": 0.4} | size


def label_ends(axes: Axes, ends: Sequence[End], inches: float = HEIGHT, letters: int = 17) -> None:
    """Write every line's name at the right of the panel, beside its end, none over another; call it last."""
    lines = [textwrap.wrap(e.look.label, letters) for e in ends]
    places = [float(axes.transAxes.inverted().transform(axes.transData.transform((e.x, e.y)))[1]) for e in ends]
    unit = 0.17 / (0.76 * inches)  # a line of text as a share of the panel's height
    top = 1.05
    for i in sorted(range(len(ends)), key=lambda i: -places[i]):
        tall = unit * len(lines[i])
        middle = min(places[i], top - tall / 2)
        top = middle - tall / 2
        axes.text(1.02, middle, "\n".join(lines[i]), transform=axes.transAxes, va="center", color=ends[i].look.colour,
                  fontsize=8, linespacing=1.05)  # fmt: skip


def legend(axes: Axes, looks: Iterable[Look], columns: int = 2, **line: Any) -> None:
    """Draw a legend below the panel, in at most so many columns."""
    below(axes, [Line2D([], [], label=look.label, **line_look(look) | line) for look in dict.fromkeys(looks)], columns)


def below(axes: Axes, handles: Sequence[Artist], columns: int) -> None:
    """Draw a legend of these handles below the panel, in at most so many columns, as many as the figure is wide."""
    if handles:
        figure, wide = axes.figure, [6 + len(str(handle.get_label())) for handle in handles]  # with the markers
        assert isinstance(figure, Figure)
        room = LETTERS * figure.get_figwidth()
        fitting = [n for n in range(1, columns + 1) if sum(max(part, default=0) for part in _columns(wide, n)) <= room]
        figure.legend(handles=handles, loc="outside lower center", ncols=max(fitting, default=1), fontsize=8)


def _columns(values: Sequence[int], count: int) -> list[Sequence[int]]:
    """Return values in so many columns as a legend fills them: one after another, the first ones longer."""
    rest, ends = len(values) % count, [0]
    for i in range(count):
        ends.append(ends[-1] + len(values) // count + (i < rest))
    return [values[a:b] for a, b in itertools.pairwise(ends)]


def logarithmic(axis: Axis) -> None:
    """Put ticks with short numbers on a logarithmic axis."""
    low, high = axis.get_view_interval()
    subs = (1,) if high / low > 1e4 else (1, 3) if high / low > 200 else (1, 2, 5) if high / low > 8 else FINE
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter(FuncFormatter(short))
    axis.set_minor_formatter(NullFormatter())
    axis.set_minor_locator(NullLocator())


def ticks(axis: Axis, values: Iterable[float]) -> None:
    """Put ticks at these values and nowhere else."""
    every = sorted(set(values))
    axis.set_major_locator(FixedLocator(every))
    axis.set_major_formatter(FixedFormatter([short(v) for v in every]))
    axis.set_minor_locator(NullLocator())


def short(x: float, _: object = None) -> str:
    """Return a number with k, M or G."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if x >= size:
            return f"{x / size:.4g}{letter}"
    return f"{x:g}"


def hidden(lines: Iterable[tuple[str, dict[float, float]]]) -> list[str]:
    """Return a sentence for each two named lines of positive values that lie on each other wherever both have a point.

    They do where they are within 3 %, or nearer than a line is thick on a logarithmic axis that has room for all.
    """
    every, said = list(lines), []
    values = [y for _, line in every for y in line.values()]
    near = max(0.03, (max(values) / min(values)) ** 0.012 - 1) if values else 0.0
    for i, (name, line) in enumerate(every):
        for other, points in every[:i]:
            both = line.keys() & points.keys()
            if len(both) > 1 and all(abs(line[x] / points[x] - 1) < near for x in both):
                said.append(f"{name} lies on {other}")
    return said
