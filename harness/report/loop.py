"""Loops of a user: every implementation in its best form, and how much of the kernels' advantage is left there."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from harness.records.speed import GPU_WAYS, Point, Speed
from harness.report import things, words
from harness.report.curves import VIT, fault_note, memory, seconds
from harness.report.figures import Drawing, chart, legend, line_look, logarithmic
from harness.report.markdown import Markdown, sparse
from harness.report.speed_tables import milliseconds, notes, number

RACE = "loop"
WHOLE = "graph"  # the way in which the whole step is one graph: the time of the kernels
SIZES = {192: "tiny", 384: "small", 576: "middle"}  # by the width
FORMS = ("eager", "graphed", "compiled", "reduce-overhead", WHOLE)
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
over the second: how much of the kernels' advantage a user has."""
READ_FORMS = """\
All forms. `ms of host a layer` is the time until the last launch has returned on an idle GPU, over the layers: of the forward,
and of forward and backward. Memory is the peak from the first step on, the capture of graphs included."""


def place(point: Point) -> Place:
    """Return what the forms of a point have in common."""
    return point.dims, point.mode, point.dtype


def title(where: Place) -> str:
    """Return a place in words."""
    sizes, mode, dtype = dict(where[0]), where[1], where[2]
    model = words.model(SIZES.get(sizes["D"], str(sizes["D"])))
    return f"{model}, {words.MODES[mode]}, {words.clips(sizes['B'], sizes['T'], sizes['S'])}, {dtype}"


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


def summary(speeds: Sequence[Speed]) -> str:
    """Return the table of best forms, and how it is read."""
    return f"{READ}\n\n{_best_forms(grouped(speeds))}"


def section(speeds: Sequence[Speed]) -> str:
    """Return the table of best forms, that of all forms, and how they are read."""
    there = grouped(speeds)
    parts = [summary(speeds), READ_FORMS, _forms(there)]
    asked = {s.point.way for mine in there.values() for s in mine}
    if missing := [way for way in FORMS if way not in asked]:
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
    head = ["model, loop, clips"]
    head += [cell for kind in KINDS for cell in (f"{kind}: ms in its best form", "graph time")]
    return sparse([*head, "upstream / ours", "of graphs", "share", "ViT / ours", "share"], rows)


def _in_form(speed: Speed) -> str:
    fault = f", {fault_note(speed)}" * bool(fault_note(speed))
    return f"{number(1e3 * seconds(speed))} ({speed.point.way}{fault})"


def _forms(there: dict[Place, list[Speed]]) -> Markdown:
    rows = []
    for where, mine in there.items():
        graphs = {s.entry: s for s in mine if s.seconds and s.point.way == WHOLE}
        for s in sorted(mine, key=lambda s: (list(KINDS).index(_kind(s)), s.entry.name, FORMS.index(s.point.way))):
            graph = graphs.get(s.entry)
            over = f"{seconds(s) / seconds(graph):.3g}" if graph and s.seconds else "-"
            rate = number(s.point["B"] / seconds(s)) if s.seconds else "-"
            host = " / ".join(f"{1e3 * h:.3f}" for h in s.host) or "-"
            held = number((memory(s) or 0) / 2**30) if s.seconds else "-"
            rows.append((title(where), words.entry(s.entry), s.point.way, milliseconds(s), over, rate, host, held, notes(s)))
    head = ["model, loop, clips", "entry", "form", "ms a step, median [95 %]", "over its graph time", "clips/s"]
    return sparse([*head, "ms of host a layer", "peak GiB", "notes"], rows)


def _kind(speed: Speed) -> str:
    return next(kind for kind, holds in KINDS.items() if holds(speed))


def draw(speeds: Iterable[Speed], folder: Path) -> list[Drawing]:
    """Draw for each model and loop the time of a step in every form, a row a form; first where ours gains most on upstream."""
    there = {where: [s for s in mine if s.seconds] for where, mine in grouped(speeds).items()}
    ordered = sorted(there.items(), key=lambda item: -(advantage(item[1], "upstream") or 0))
    return [_draw(where, mine, folder) for where, mine in ordered if mine]


def _draw(where: Place, mine: list[Speed], folder: Path) -> Drawing:
    sizes = "".join(f"{letter}{size}" for letter, size in where[0] if letter != "L")
    stem, forms = f"{RACE}-{sizes}-{where[1]}-{where[2]}", [way for way in FORMS if any(s.point.way == way for s in mine)]
    chosen = [
        s for s in mine if any(s is best([t for t in mine if t.point.way == w], k, w == WHOLE) for w in forms for k in KINDS)
    ]
    with chart(folder, stem, height=1.3 + 0.32 * len(forms)) as axes:
        for s in sorted(chosen, key=lambda s: -things.rank(s.entry.implementation)):
            axes.plot(1e3 * seconds(s), forms.index(s.point.way), **line_look(things.of(s.entry)) | {"markersize": 7})
        axes.set_yticks(range(len(forms)), ["kernels alone" if way == WHOLE else way for way in forms])
        axes.set_ylim(len(forms) - 0.5, -0.5)
        axes.set(xscale="log", xlabel="ms a step")
        logarithmic(axes.xaxis)
        legend(axes, sorted({things.of(s.entry) for s in chosen}, key=lambda look: look.label), columns=3, linewidth=0)
    notes = sorted({fault_note(s)[:60] for s in chosen} - {""})
    return Drawing(folder / f"{stem}.svg", "; ".join([f"{title(where)}: medians, the host's time included", *notes]) + ".")
