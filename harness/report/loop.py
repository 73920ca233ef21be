"""Loops of a user: every implementation in its best form, and how much of the kernels' advantage is left there."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from harness.records.speed import GPU_WAYS, Point, Speed
from harness.report.curves import VIT, fault_note, memory, seconds
from harness.report.figures import STYLE, colour, legend_below, save
from harness.report.markdown import Markdown, table
from harness.report.speed_figures import FINE, short
from harness.report.speed_tables import entry_name, milliseconds, notes, number

RACE = "loop"
WHOLE = "graph"  # the way in which the whole step is one graph: the time of the kernels
SIZES = {192: "Ti", 384: "S", 576: "M"}
MARKERS = {"eager": "o", "graphed": "s", "compiled": "^", "reduce-overhead": "D", WHOLE: "|"}
Place = tuple[Any, ...]
KINDS: dict[str, Callable[[Speed], bool]] = {
    "ours": lambda s: s.entry.role == "ours",
    "upstream": lambda s: s.entry.role == "rival" and s.entry.subject != VIT,
    "ViT": lambda s: s.entry.subject == VIT,
}
READ = """\
A step is timed by the wall clock, over windows of steps that are synchronised at their ends only; a sample is a window, divided
by its steps. Training is a new batch, autocast to the point's dtype, clipping, AdamW; inference has parameters of that dtype.
`graph time` is the same step as one CUDA graph: the kernels without the host, which is no form that is compared. `best form` is
the fastest of the others. `upstream / ours` is the ratio of best forms, `of graphs` that of graph times, and `share` the first
over the second: how much of the kernels' advantage a user has. `host a layer` is the time until the last launch has returned
on an idle GPU, over the layers: of the forward, and of forward and backward. Memory is the peak from the first step on, the
capture of graphs included."""


def place(point: Point) -> Place:
    """Return what the forms of a point have in common."""
    return point.dims, point.mode, point.dtype


def title(where: Place) -> str:
    """Return a place in words."""
    sizes, mode, dtype = dict(where[0]), where[1], where[2]
    return f"{SIZES.get(sizes['D'], sizes['D'])}, {mode}, {sizes['B']} x {sizes['T']} x {sizes['S']} px, {dtype}"


def grouped(speeds: Iterable[Speed]) -> dict[Place, list[Speed]]:
    """Return the speeds of the race by place."""
    found: dict[Place, list[Speed]] = {}
    for s in speeds:
        if s.point.race == RACE:
            found.setdefault(place(s.point), []).append(s)
    return found


def best(speeds: Iterable[Speed], kind: str, whole: bool = False) -> Speed | None:
    """Return the fastest of a kind at a place: of all forms, or of the whole step as one graph."""
    mine = [s for s in speeds if s.seconds and KINDS[kind](s) and (s.point.way == WHOLE) == whole]
    return min(mine, key=seconds, default=None)


def advantage(speeds: Sequence[Speed], kind: str, whole: bool = False) -> float | None:
    """Return how many times ours a rival's time is, None where one of them has none."""
    ours, theirs = best(speeds, "ours", whole), best(speeds, kind, whole)
    return seconds(theirs) / seconds(ours) if ours and theirs else None


def share(speeds: Sequence[Speed], kind: str) -> float | None:
    """Return the advantage of the best forms over that of graph times, None where one of these is not known."""
    found, of_graphs = advantage(speeds, kind), advantage(speeds, kind, whole=True)
    return found / of_graphs if found and of_graphs else None


def section(speeds: Sequence[Speed]) -> str:
    """Return the table of best forms, that of all forms, and how they are read."""
    there = grouped(speeds)
    parts = [READ, _best_forms(there), "All forms:", _forms(there)]
    asked = {s.point.way for mine in there.values() for s in mine}
    if missing := [way for way in MARKERS if way not in asked]:
        why = " (they need a GPU)" if asked.isdisjoint(GPU_WAYS) else ""
        parts.append(f"Not timed in this run: {', '.join(missing)}{why}.")
    return "\n\n".join(parts)


def _best_forms(there: dict[Place, list[Speed]]) -> Markdown:
    rows = []
    for where, mine in there.items():
        cells: list[str] = [title(where)]
        for kind in KINDS:
            found, graph = best(mine, kind), best(mine, kind, whole=True)
            lost = next((s for s in mine if KINDS[kind](s) and not s.seconds), None)
            cells.append(_in_form(found) if found else milliseconds(lost) if lost else "-")
            cells.append(number(1e3 * seconds(graph)) if graph else "-")
        ratios = [advantage(mine, "upstream"), advantage(mine, "upstream", whole=True), share(mine, "upstream")]
        ratios += [advantage(mine, "ViT"), share(mine, "ViT")]
        rows.append((*cells, *(f"{r:.3g}" if r else "-" for r in ratios)))
    head = ["model, loop, clips x frames"]
    head += [cell for kind in KINDS for cell in (f"{kind}: ms in its best form", "graph time")]
    return table([*head, "upstream / ours", "of graphs", "share", "ViT / ours", "share"], rows)


def _in_form(speed: Speed) -> str:
    fault = f", {fault_note(speed)}" * bool(fault_note(speed))
    return f"{number(1e3 * seconds(speed))} ({speed.point.way}{fault})"


def _forms(there: dict[Place, list[Speed]]) -> Markdown:
    rows = []
    for where, mine in there.items():
        graphs = {s.entry: s for s in mine if s.seconds and s.point.way == WHOLE}
        for s in sorted(mine, key=lambda s: (list(KINDS).index(_kind(s)), s.entry.name, list(MARKERS).index(s.point.way))):
            graph = graphs.get(s.entry)
            over = f"{seconds(s) / seconds(graph):.3g}" if graph and s.seconds else "-"
            rate = number(s.point["B"] / seconds(s)) if s.seconds else "-"
            host = " / ".join(f"{1e3 * h:.3f}" for h in s.host) or "-"
            held = number((memory(s) or 0) / 2**30) if s.seconds else "-"
            rows.append((title(where), entry_name(s.entry), s.point.way, milliseconds(s), over, rate, host, held, notes(s)))
    head = ["model, loop, clips x frames", "entry", "form", "ms a step, median [95 %]", "over its graph time", "clips/s"]
    return table([*head, "ms of host a layer", "peak GiB", "notes"], rows)


def _kind(speed: Speed) -> str:
    return next(kind for kind, holds in KINDS.items() if holds(speed))


def draw(speeds: Iterable[Speed], folder: Path) -> list[Path]:
    """Draw loop.png and .svg in the folder: the time of every form at every place. Return their paths."""
    there = {where: [s for s in mine if s.seconds] for where, mine in grouped(speeds).items()}
    there = {where: mine for where, mine in there.items() if mine}
    if not there:
        return []
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10.5, 1.6 + 0.55 * len(there)), layout="constrained")
        figure.suptitle("A user's loop, the host included: medians of every form; a stroke is the kernels' time")
        axes = figure.subplots()
        for row, mine in enumerate(there.values()):
            _row(axes, row, mine)
        axes.set_yticks(range(len(there)), [title(where) for where in there])
        axes.set_ylim(len(there) - 0.5, -0.5)
        axes.set_xscale("log")
        axes.set_xlabel("ms a step")
        low, high = axes.xaxis.get_view_interval()
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low > 8 else FINE))
        axes.xaxis.set_major_formatter(FuncFormatter(short))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid(True, axis="x", color="0.9")
        axes.set_axisbelow(True)
        legend_below(figure, _handles([s for mine in there.values() for s in mine]), most=4)
        return save(figure, folder, RACE)


def _row(axes: Axes, row: int, mine: list[Speed]) -> None:
    for number_of, kind in enumerate(KINDS):
        height = row + 0.26 * (number_of - 1)
        for s in (s for s in mine if KINDS[kind](s)):
            look: dict[str, Any] = {"color": colour(number_of), "markersize": 11 if s.point.way == WHOLE else 5}
            look |= {"markeredgewidth": 2.0} if s.point.way == WHOLE else {"markerfacecolor": "white"}
            if s is best(mine, kind):
                look["markerfacecolor"] = colour(number_of)
            axes.plot(1e3 * seconds(s), height, MARKERS[s.point.way], **look)


def _handles(timed: list[Speed]) -> list[Line2D]:
    """Return a line for each kind with the faults of its entries, then a marker for each form; the best is filled."""
    handles = []
    for number_of, (kind, holds) in enumerate(KINDS.items()):
        if mine := [s for s in timed if holds(s)]:
            doubts = sorted({fault_note(s)[:60].upper() for s in mine} - {""})
            label = ", ".join([kind, *doubts])
            handles.append(Line2D([], [], color=colour(number_of), linewidth=5, label=label))
    for way in [way for way in MARKERS if any(s.point.way == way for s in timed)]:
        look: dict[str, Any] = {"color": "0.3", "linewidth": 0, "markerfacecolor": "white"}
        label = "whole step as one graph" if way == WHOLE else way
        handles.append(Line2D([], [], marker=MARKERS[way], label=label, **look))
    return handles
