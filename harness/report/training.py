"""Short trainings compared with the one in float64: their losses, and how far their parameters are from it, step by step."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from matplotlib.axes import Axes

from harness.checks.convergence import FREE, GOT, LOSS, NAME, PLAIN, TRUTH
from harness.judge.protocols import Trainable
from harness.judge.registry import subjects
from harness.records.record import Record
from harness.report import things
from harness.report.figures import INK, Drawing, chart, legend
from harness.report.things import Look

GREY = "#8c8c8c"
PLAIN_LOOK = Look("reference, same precision", GREY, "")
STANDARDS = {
    "loss": (Look("reference, float64", INK, ""), PLAIN_LOOK),
    "distance": (PLAIN_LOOK, Look("shaded: allowed", "#d1d1d1", "")),
}
Curves = dict[str, tuple[float, ...]]


def trainings(records: Iterable[Record], folder: Path) -> list[Drawing]:
    """Draw two figures for each case: the losses, and the distances from the training in float64."""
    drawable = [(r, curves(r)) for r in records if r.check == NAME]
    drawable = [(r, lines) for r, lines in drawable if lines]
    found = []
    for place, (subject, case) in enumerate(dict.fromkeys((r.subject, r.case) for r, _ in drawable), 1):
        mine = [(r, lines) for r, lines in drawable if (r.subject, r.case) == (subject, case)]
        judged = subjects().get(subject)
        task = judged.training_title() if isinstance(judged, Trainable) else "training"
        lost = sum(r.failed for r, _ in mine)
        for what, draw in (("loss", _losses), ("distance", _distances)):
            stem = f"{NAME}-{place}-{what}"
            with chart(folder, stem) as axes:
                draw(axes, mine)
                axes.set_xlim(left=0)
                axes.set_xlabel("step")
                legend(axes, [*STANDARDS[what], *(things.look(r.implementation) for r, _ in mine)], columns=2, marker="")
            said = f"{subject}, {task}, {mine[0][0].dtype}: {what}" + f"; {lost} failed" * bool(lost)
            found.append(Drawing(folder / f"{stem}.svg", said))
    return found


def curves(record: Record) -> Curves:
    """Return the curves that a record holds of a training, step by step."""
    return {f.tensor: f.curve for f in record.findings if f.curve}


def _losses(axes: Axes, mine: Sequence[tuple[Record, Curves]]) -> None:
    """Draw the losses, the truth above the others."""
    _, common = mine[0]
    axes.plot(common[f"{LOSS}, {PLAIN}"], color=GREY, linewidth=3)
    for r, lines in mine:
        axes.plot(lines[f"{LOSS}, {GOT}"], color=things.look(r.implementation).colour)
    axes.plot(common[f"{LOSS}, {TRUTH}"], color=INK, linewidth=0.9)
    axes.set_ylabel("loss of the step's batch")
    axes.set_ylim(bottom=0)


def _distances(axes: Axes, mine: Sequence[tuple[Record, Curves]]) -> None:
    """Draw the distance of every implementation, over the area in which it has to stay."""
    _, common = mine[0]
    plain = [line for name, line in common.items() if name.startswith(f"{PLAIN} run")]
    allowed = [2 * max(at) for at in zip(*plain, strict=True)]
    axes.set_yscale("log")
    for line in plain:
        axes.plot(line, color=GREY, linewidth=0.8)
    for r, lines in mine:
        line = lines[FREE]
        axes.plot(range(1, len(line)), line[1:], color=things.look(r.implementation).colour)
    floor = axes.get_ylim()[0]
    axes.fill_between(range(len(allowed)), floor, allowed, color=GREY, alpha=0.2, linewidth=0, zorder=0)
    axes.set_ylim(bottom=floor)
    axes.set_ylabel("distance from float64 / norm")
