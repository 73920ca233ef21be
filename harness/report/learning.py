"""The page of a run of `learn`: the results against their bars, and the curves of the trainings."""

import re
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from harness.learning.tasks import TASKS
from harness.records.finding import Finding
from harness.records.record import Record
from harness.report import glossary, html, markdown, tables, things
from harness.report.figures import INK, Drawing, chart, legend, line_look, shown
from harness.report.html import Number, Page, Section
from harness.report.markdown import bold, escape
from harness.report.parity import again, box
from harness.runs.store import Run

STEM = "learning"
HOW = """\
Each training starts from weights that its seed gives, the same for every implementation, and takes AdamW with a cosine
schedule through batches that are drawn anew at each step. What is held out is never trained on: of `digits`, `motion` and
`retrieval` every fifth of scikit-learn's 1797 handwritten digits, which the same people wrote as the rest; of `arrow` the end
of the video's time. A bar has to be exceeded; where there is none, any share passes, if every loss was a number. A training is
evaluated ten times; the last evaluation counts, not the best. Chance is the share that guessing gives."""


def write(run: Run) -> Path:
    """Write report.md, its figures and report.html into the run's folder; return the path of report.md."""
    here = run.about.get("box", {})
    tasks, where = ", ".join(run.about.get("plan", {}).get("tasks", [])), here.get("gpu") or here.get("cpu") or "?"
    title = f"Learning on {where}: {tasks}, {str(run.about.get('started', '?'))[:10]}"
    drawn = draw(run.records, run.folder)
    described = (f"- `{task.name}`: {task.title}" for task in TASKS.values())
    sections = [
        Section("What was learnt", table(run.records)),
        Section("Step by step", shown(drawn[1:]) or "Nothing more to draw."),
        Section("What failed", tables.failures(run.records)),
        Section("How it was measured", "\n".join([HOW, "", *described]), folded=True),
        Section("The box", box(run), folded=True),
        Section("How to repeat it", again(run)),
        Section("Glossary", glossary.terms(), folded=True),
    ]  # fmt: skip
    chart = shown(drawn[:1]) or "Nothing to draw: no training was evaluated."
    return html.write(run.folder, Page(title, "\n\n".join([_verdict(run), *_warnings(run)]), _numbers(run), chart, sections))


def _numbers(run: Run) -> list[Number]:
    """Return the share of right answers of each training of ours, up to five."""
    found = []
    for r in run.records:
        if (result := _held_out(r)) and r.role == "ours":
            right, look = f"{100 * (1 - result.error / result.scale):.1f}", things.look(r.implementation).label
            said = f"right of {result.scale:.0f} held out: {r.subject}, {look}; {result.note}, chance {_chance(r)}"
            found.append(Number(right, "%", said))
    return found[:5]


def one_line(record: Record) -> str:
    """Return a training in a line."""
    who = f"{record.status.upper()} ({record.role}) {record.subject} {record.implementation} {record.case}"
    result = _held_out(record)
    if result is None:
        return f"{who}: {record.reason}\n    {record.command}"
    answer = f"{who}: {_share(result)} right, {result.note}, {record.seconds:.0f} s"
    return answer + f"\n    {record.command}" * record.failed


def table(records: Sequence[Record]) -> str:
    """Return a table of all trainings with their verdicts."""
    rows = []
    for r in records:
        result = _held_out(r)
        right, bar = (_share(result), result.note) if result else ("-", r.reason)
        verdict = bold(r.status.upper()) if r.failed else r.status
        rows.append((r.subject, r.implementation + tables.mark(r), r.case, right, _chance(r), bar, verdict, f"{r.seconds:.0f}"))
    head = ["task", "implementation", "training", "held out, right", "chance", "bar", "verdict", "seconds"]
    return markdown.table(head, rows)


def draw(records: Sequence[Record], folder: Path) -> list[Drawing]:
    """Draw for each task the share of right answers, then the losses, over the steps."""
    mine = [r for r in records if curve(r, "loss")]
    tasks = list(dict.fromkeys(r.subject for r in mine))
    return [_draw([r for r in mine if r.subject == task], what, folder) for what in ("right", "loss") for task in tasks]


def curve(record: Record, what: str) -> dict[int, Finding]:
    """Return the findings of one kind, by step."""
    return {int(f.tensor.split()[1]): f for f in record.findings if f.norm == what and f.tensor.startswith("step ")}


def _draw(records: Sequence[Record], what: str, folder: Path) -> Drawing:
    """Draw a line for each training of a task."""
    task = TASKS[records[0].subject]
    stem = f"{STEM}-{task.name}-{what}"
    with chart(folder, stem) as axes:
        for r in records:
            points = curve(r, "loss" if what == "loss" else "wrong")
            values = [f.error if what == "loss" else 1 - f.error / f.scale for f in points.values()]
            axes.plot(list(points), values, **line_look(things.look(r.implementation)))
            result = _held_out(r)
            if what == "right" and result and (bar := re.search(r"bar (\d+)", result.note)):
                axes.axhline(int(bar[1]) / 100, color=INK, linestyle="--", linewidth=1)
                _name(axes, int(bar[1]) / 100, "bar", "top")
        axes.set(xlabel="step", ylabel="loss" if what == "loss" else "right, of held-out answers", ylim=(0, None))
        if what == "right":
            axes.axhline(1 / task.config["num_classes"], color=INK, linestyle=":", linewidth=1)
            _name(axes, 1 / task.config["num_classes"], "chance", "bottom")
            axes.set_ylim(0, 1.02)
            axes.yaxis.set_major_formatter(PercentFormatter(1))
        legend(axes, [things.look(r.implementation) for r in records])
    said = {"loss": "mean loss since the evaluation before", "right": "share of held-out answers that are right"}[what]
    return Drawing(folder / f"{stem}.svg", f"{task.title[:1].upper() + task.title[1:]}: {said}. A line a seed.")


def _name(axes: Axes, y: float, word: str, edge: str) -> None:
    """Write the name of a horizontal line at its right end, with this edge of the text on the line."""
    axes.text(1, y, f"{word} ", transform=axes.get_yaxis_transform(), ha="right", va=edge, fontsize=8)


def _held_out(record: Record) -> Finding | None:
    """Return the finding about held-out answers, if there is one."""
    return next((f for f in record.findings if f.tensor == "held out"), None)


def _share(result: Finding) -> str:
    """Return the share of right answers in words."""
    return f"{100 * (1 - result.error / result.scale):.1f} % of {result.scale:.0f}"


def _chance(record: Record) -> str:
    """Return the share that guessing gives."""
    return f"{100 / TASKS[record.subject].config['num_classes']:.3g} %"


def _verdict(run: Run) -> str:
    """Return the verdict as a sentence."""
    counts, status = run.counts(), run.about.get("status")
    asked = counts["passed"] + counts["failed"]
    said = (
        f"{counts['passed']} of {asked} trainings of ours reached what their tasks demand."
        if asked
        else "No training of ours ran."
    )
    return said + f" So far: the run is {escape(status)}." * (status != "finished")


def _warnings(run: Run) -> list[str]:
    """Return the limits of the verdict, a paragraph each."""
    plan, said = run.about.get("plan", {}), []
    if run.about.get("status") != "finished":
        said.append(f"> **Not finished** (status: {escape(run.about.get('status'))}). Trainings are missing.")
    if plan.get("short"):
        said.append("> **Short.** Fewer steps and lower bars than the tasks' own.")
    if plan.get("steps"):
        said.append(f"> **{plan['steps']} steps**, not the tasks' own; fewer than those are not held to a bar.")
    if missing := [name for name in TASKS if name not in plan.get("tasks", [])]:
        said.append(f"> **A part of the tasks.** Not asked: {', '.join(missing)}.")
    return said
