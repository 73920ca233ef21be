"""The page of a run of `learn`: the results against their bars, and the curves of the trainings."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter

from harness.learning.tasks import TASKS
from harness.records.finding import Finding
from harness.records.record import Record
from harness.report import markdown, tables
from harness.report.figures import STYLE, colour, legend_below, save
from harness.report.html import write_both
from harness.report.markdown import bold, escape
from harness.report.page import again, box
from harness.runs.store import Run

STEM = "learning"
HOW = """\
Each training starts from weights that its seed gives, the same for every implementation, and takes AdamW with a cosine
schedule through batches that are drawn anew at each step. What is held out is never trained on: of `digits` and `motion` every
fifth of scikit-learn's 1797 handwritten digits, which the same people wrote as the rest; of `arrow` the end of the video's
time. A bar has to be exceeded; where there is none, any share passes, if every loss was a number. A training is
evaluated ten times; the last evaluation counts, not the best. Chance is the share that guessing gives."""


def write(run: Run) -> Path:
    """Write report.md, its figure and report.html into the run's folder; return the path of report.md."""
    here = run.about.get("box", {})
    title = f"Learning: {', '.join(run.about.get('plan', {}).get('tasks', []))} on {here.get('gpu') or here.get('cpu') or '?'}"
    drawn = draw(run.records, run.folder)
    plot = "Nothing to draw: no training was evaluated."
    if drawn:
        png, svg = (path.name for path in drawn)
        plot = f"![Loss and accuracy over the steps]({png})\n\nIn vectors: [{svg}]({svg})"
    parts = [
        f"# {escape(title)}",
        _verdict(run),
        *_warnings(run),
        "## What was learnt", table(run.records),
        "## Step by step", plot,
        "## Failures", tables.failures(run.records),
        "## How to read this", HOW,
        "\n".join(f"- `{task.name}`: {task.title}" for task in TASKS.values()),
        "## The box", box(run),
        "## Again", again(run),
    ]  # fmt: skip
    return write_both(run.folder, "\n\n".join(parts) + "\n", title)


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
        chance = f"{100 / TASKS[r.subject].config['num_classes']:.3g} %"
        verdict = bold(r.status.upper()) if r.failed else r.status
        rows.append((r.subject, r.implementation + tables.mark(r), r.case, right, chance, bar, verdict, f"{r.seconds:.0f}"))
    head = ["task", "implementation", "training", "held out, right", "chance", "bar", "verdict", "seconds"]
    return markdown.table(head, rows)


def draw(records: Sequence[Record], folder: Path) -> list[Path]:
    """Draw learning.png and .svg in the folder: a column a task, loss above accuracy. Return their paths."""
    mine = [r for r in records if curve(r, "loss")]
    if not mine:
        return []
    columns = list(dict.fromkeys(r.subject for r in mine))
    names = list(dict.fromkeys(r.implementation for r in mine))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(max(6.0, 3.6 * len(columns)), 5.6), layout="constrained")
        figure.suptitle("Loss and share of held-out answers that are right, a line a seed")
        panels = figure.subplots(2, len(columns), sharex="col", squeeze=False)
        for (above, under), task in zip(panels.T, columns, strict=True):
            _panels(above, under, [r for r in mine if r.subject == task], names)
        panels[0][0].set_ylabel("loss (mean since the evaluation before)")
        panels[1][0].set_ylabel("right, of held-out answers")
        bar = Line2D([], [], color="0.3", linestyle="--", label="bar")
        chance = Line2D([], [], color="0.3", linestyle=":", label="chance")
        legend_below(figure, [*(Line2D([], [], color=colour(i), label=n) for i, n in enumerate(names)), bar, chance], most=4)
        return save(figure, folder, STEM)


def curve(record: Record, what: str) -> dict[int, Finding]:
    """Return the findings of one kind, by step."""
    return {int(f.tensor.split()[1]): f for f in record.findings if f.norm == what and f.tensor.startswith("step ")}


def _panels(above: Axes, under: Axes, records: list[Record], names: list[str]) -> None:
    """Draw a task's losses and shares of right answers over the steps."""
    for r in records:
        look: dict[str, Any] = {"color": colour(names.index(r.implementation)), "marker": ".", "linewidth": 1.0}
        loss, missed = curve(r, "loss"), curve(r, "wrong")
        above.plot(list(loss), [f.error for f in loss.values()], **look)
        under.plot(list(missed), [1 - f.error / f.scale for f in missed.values()], **look)
        result = _held_out(r)
        found = re.search(r"bar (\d+)", result.note) if result else None
        if found:
            under.axhline(int(found[1]) / 100, color="0.3", linestyle="--", linewidth=1)
    task = TASKS[records[0].subject]
    under.axhline(1 / task.config["num_classes"], color="0.3", linestyle=":", linewidth=1)
    above.set(title=task.title, ylim=(0, None))
    under.set(xlabel="step", ylim=(0, 1.02))
    under.yaxis.set_major_formatter(PercentFormatter(1))
    for axes in (above, under):
        axes.grid(True, color="0.9")
        axes.set_axisbelow(True)


def _held_out(record: Record) -> Finding | None:
    """Return the finding about held-out answers, if there is one."""
    return next((f for f in record.findings if f.tensor == "held out"), None)


def _share(result: Finding) -> str:
    """Return the share of right answers in words."""
    return f"{100 * (1 - result.error / result.scale):.1f} % of {result.scale:.0f}"


def _verdict(run: Run) -> str:
    """Return the verdict in bold, with counts."""
    counts = run.counts()
    word = "FAILED" if counts["failed"] else "PASSED" if counts["passed"] else "NOTHING RAN"
    word += f" SO FAR ({run.about.get('status')})" * (run.about.get("status") != "finished")
    return f"**{word}.**\n\n`{run.last_line()}`"


def _warnings(run: Run) -> list[str]:
    """Return the limits of the verdict, a paragraph each."""
    plan, said = run.about.get("plan", {}), []
    if run.about.get("status") != "finished":
        said.append(f"> **NOT FINISHED** (status: {escape(run.about.get('status'))}). Trainings are missing.")
    if plan.get("short"):
        said.append("> **SHORT.** Fewer steps and lower bars than the tasks' own.")
    if plan.get("steps"):
        said.append(f"> **{plan['steps']} STEPS**, not the tasks' own; fewer than those are not held to a bar.")
    if missing := [name for name in TASKS if name not in plan.get("tasks", [])]:
        said.append(f"> **FILTERED.** Not asked: {', '.join(missing)}.")
    return said
