"""Short trainings compared with the one in float64: their losses, and how far their parameters are from it, step by step."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from harness.checks.convergence import FREE, GOT, LOSS, NAME, PLAIN, TRUTH
from harness.judge.protocols import Trainable
from harness.judge.registry import subjects
from harness.records.record import Record
from harness.report.figures import STYLE, colour, legend_below, save

GREY = "0.55"
Curves = dict[str, tuple[float, ...]]


def trainings(records: Iterable[Record], folder: Path) -> list[Path]:
    """Draw NAME.png and .svg in the folder: two panels a case, all implementations in them. Return their paths."""
    drawable = [(r, curves(r)) for r in records if r.check == NAME]
    drawable = [(r, lines) for r, lines in drawable if lines]
    if not drawable:
        return []
    cases = list(dict.fromkeys((r.subject, r.case) for r, _ in drawable))
    names = list(dict.fromkeys(r.implementation for r, _ in drawable))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, 3.1 * len(cases) + 0.4), layout="constrained")
        panels = figure.subplots(len(cases), 2, squeeze=False)
        for (losses, distances), case in zip(panels, cases, strict=True):
            mine = [(r, lines) for r, lines in drawable if (r.subject, r.case) == case]
            _losses(losses, mine, names)
            _distances(distances, mine, names)
        legend_below(figure, _legend([r for r, _ in drawable], names), most=3)
        return save(figure, folder, NAME)


def curves(record: Record) -> Curves:
    """Return the curves that a record holds of a training, step by step."""
    return {f.tensor: f.curve for f in record.findings if f.curve}


def _losses(axes: Axes, mine: Sequence[tuple[Record, Curves]], names: list[str]) -> None:
    """Draw the losses, the truth in black above the others."""
    record, common = mine[0]
    axes.plot(common[f"{LOSS}, {PLAIN}"], color=GREY, linewidth=3)
    for r, lines in mine:
        axes.plot(lines[f"{LOSS}, {GOT}"], color=colour(names.index(r.implementation)), linewidth=1.6)
    axes.plot(common[f"{LOSS}, {TRUTH}"], color="black", linewidth=0.9, dashes=(4, 2))
    axes.set(ylabel="loss of the step's batch", xlabel="step")
    axes.set_ylim(bottom=0)
    _finish(axes, record)


def _distances(axes: Axes, mine: Sequence[tuple[Record, Curves]], names: list[str]) -> None:
    """Draw the distance of every implementation, over the area in which it has to stay."""
    record, common = mine[0]
    plain = [line for name, line in common.items() if name.startswith(f"{PLAIN} run")]
    allowed = [2 * max(at) for at in zip(*plain, strict=True)]
    axes.set_yscale("log")
    for line in plain:
        axes.plot(line, color=GREY, linewidth=0.8)
    for r, lines in mine:
        line = lines[FREE]
        axes.plot(range(1, len(line)), line[1:], color=colour(names.index(r.implementation)), linewidth=1.6)
    floor = axes.get_ylim()[0]
    axes.fill_between(range(len(allowed)), floor, allowed, color="0.92", zorder=0)
    axes.plot(allowed, color="black", linewidth=0.9, linestyle=":")
    axes.set_ylim(bottom=floor)
    axes.set(ylabel="distance from float64 / norm", xlabel="step")
    _finish(axes, record)


def _finish(axes: Axes, record: Record) -> None:
    """Set the title and grid of a panel."""
    subject = subjects().get(record.subject)
    task = subject.training_title() if isinstance(subject, Trainable) else "training"
    axes.set_title(f"{record.subject}, {task}, {record.dtype}", fontsize="medium")
    axes.set_xlim(left=0)
    axes.grid(True, color="0.9")
    axes.set_axisbelow(True)


def _legend(records: Sequence[Record], names: list[str]) -> list[Line2D | Patch]:
    """Return the legend, with the failures of each implementation."""
    def label(name: str) -> str:
        lost = sum(r.failed for r in records if r.implementation == name)
        return name + f" ({lost} FAILED)" * bool(lost)

    return [
        Line2D([], [], color="black", linewidth=0.9, dashes=(4, 2), label="truth: the reference in float64"),
        Line2D([], [], color=GREY, label="plain: the reference in the case's precision"),
        Patch(facecolor="0.92", edgecolor="black", linestyle=":", label="allowed: twice the farthest of 4 plain runs"),
        *(Line2D([], [], color=colour(i), linewidth=1.6, label=label(name)) for i, name in enumerate(names)),
    ]
