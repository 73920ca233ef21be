"""The page of a parity run: the verdict and what it does not cover first, the evidence below."""

import math
from datetime import datetime
from pathlib import Path
from typing import Any

from harness.fixtures.video import SHIPPED
from harness.report import deviation, figures, tables, training
from harness.report.html import write_both
from harness.report.markdown import bold, code, escape, fence, table
from harness.runs import sessions
from harness.runs.store import Run

HOW = """\
There is one tolerance rule and no hand-typed tolerance. Truth is the reference in float64, plain is the reference in the
case's own precision. An implementation may be wrong by twice what plain is wrong by, plus one unit roundoff of the truth's
size (of the dtype in which plain returns the tensor, plus 8 unit roundoffs of float32 for a hardware exp2; none in float64):
that is one budget, and an error above 1 budget fails. Every output, state and gradient is held to it in two norms, L2 and
max-abs, each pooled (root mean square) over the seeds; where truth and plain are exactly 0, exactly 0 is due (`zero`), and
NaN or infinity never passes. `inf` budgets means an error where none is allowed, or no number at all.

- `forward` asks it of outputs and states, `backward` of the gradients of every input, parameter and state.
- `gradcheck` asks whether the reference's own gradients are the slopes of its outputs, by finite differences in float64.
- `chunks` asks whether a sequence cut anywhere and chained by its state equals the whole.
- `forward_chunked` asks whether a bidirectional model run in the memory of a chunk of the video equals the whole clip.
- `forward_approximate` asks whether the approximate online mode is what its definition says; its distance from the exact
  result (`deviation`) is measured and may be anything.
- `determinism` asks whether the same call gives the same bits again, here and in another process.
- `batch` asks whether a clip's bits depend on its batch size, its place in the batch, or its neighbours (operators only).
- `writes` asks whether every element of every result is written, nothing beside them, and no input changed.
- `strides` asks whether inputs may lie anywhere: strided, expanded, at odd offsets, with more than 2^31 elements.
- `compile` asks whether registered ops are well formed, and whether compiled and captured calls equal eager ones.
- `extremes` asks about huge, tiny and denormal values, NaN (which must come out as NaN), and lengths (full: to 100,353 tokens).
- `convergence` trains a tiny model on frames of the video. At every fifth step of a training in float64 it asks the rule of one
  step from there, under autocast from seven states near by too, in losses and gradients; and whether a run left to itself
  stays by the float64 one (see the plot).
- `device` asks whether a device that is not the current one gives the same.
- `layout` asks whether a state_dict has the reference's names, shapes and dtypes.

`error`, `oom` and `timeout` count as failed. A skip is no pass: it says that a question was not asked, and why.
Rivals are judged by the same rule and shown as plainly, but do not decide the exit code."""


APPROXIMATE = """\
What `forward_approximate` gives differs from the exact result, by its nature: the backward direction does not know what comes.
Measured on weights that were drawn, not trained; it is not held to any budget.

![Deviation against chunk and look-ahead]({0})

In vectors: [{1}]({1})"""

TRAININGS = """\
The same short training, started from the same numbers: by the reference in float64 (truth), by the reference in the case's own
precision (plain), and by each implementation. On the left the loss, on the right how far the parameters are from those of the
truth, as a share of their norm. Plain was run four times, from parameters moved by one unit in the last place of float32 and
with clips moved by one rounding: the grey lines are what rounding alone makes of a training. An implementation may be twice as
far off as the farthest of them, after every step; one that leaves the grey area fails. `convergence` also judges single steps,
by the rule: see the tables.

![Losses and distances of short trainings]({0})

In vectors: [{1}]({1})"""


def write(run: Run) -> Path:
    """Write report.md, its figures and report.html into the run's folder; return the path of report.md."""
    plan, here = run.about.get("plan", {}), run.about.get("box", {})
    subjects = list(dict.fromkeys(r.subject for r in run.records))
    drawn = figures.error_against_length(run.records, run.folder)
    plot = "Nothing to draw: no numbers of the scan's forward or backward."
    if drawn:
        png, svg = (path.name for path in drawn)
        plot = f"![Error against sequence length]({png})\n\nIn vectors: [{svg}]({svg})"
    near, trained = deviation.approximate(run.records, run.folder), training.trainings(run.records, run.folder)
    title = f"Parity: grid {plan.get('grid', '?')} on {here.get('gpu') or here.get('cpu') or '?'}"
    parts = [
        f"# {escape(title)}",
        _verdict(run),
        *_warnings(run),
        "## Checks and implementations",
        *(f"### {escape(s)}\n\n{tables.matrix([r for r in run.records if r.subject == s])}" for s in subjects),
        _video(run),
        "## Failures", tables.failures(run.records),
        "## Worst errors", "In budgets; above 1 fails.", tables.worst_errors(run.records),
        "## Error against length", plot,
        *(["## The approximate online mode", APPROXIMATE.format(*(path.name for path in near))] if near else []),
        *(["## Trainings", TRAININGS.format(*(path.name for path in trained))] if trained else []),
        "## Skipped questions", tables.skips(run.records),
        "## How to read this", HOW,
        "## The box", box(run),
        "## Again", again(run),
    ]  # fmt: skip
    return write_both(run.folder, "\n\n".join(parts) + "\n", title)


def _verdict(run: Run) -> str:
    """Return the verdict in bold, with counts."""
    ours, rivals = run.counts(), run.counts("rival")
    word = "FAILED" if ours["failed"] else "PASSED" if ours["passed"] else "NOTHING OF OURS RAN"
    word += f" SO FAR ({run.about.get('status')})" * (run.about.get("status") != "finished")
    ours_said, rivals_said = (", ".join(f"{n} {k}" for k, n in counts.items()) for counts in (ours, rivals))
    return f"**{word}.** ours: {ours_said}; rivals: {rivals_said}\n\n`{run.last_line()}`"


def _warnings(run: Run) -> list[str]:
    """Return the limits of the verdict, a paragraph each."""
    plan, said = run.about.get("plan", {}), []
    if mutant := plan.get("mutant"):
        caught = "it was caught" if run.counts()["failed"] else "IT WAS NOT CAUGHT"
        said.append(f"> {bold(f'A BUG WAS PLANTED in fused: {mutant}')} ({caught}). This run says nothing of the product.")
    if run.about.get("status") == "interrupted":
        said.append("> **INTERRUPTED.** Questions are missing; nothing below is the whole answer.")
    elif run.about.get("status") != "finished":
        said.append(f"> **NOT FINISHED** (status: {escape(run.about.get('status'))}). Questions are missing.")
    if run.about.get("filtered"):
        narrowed = [f"{k} {', '.join(plan[k])}" for k in ("subjects", "checks", "names", "dtypes", "cases") if plan.get(k)]
        what = "; ".join([f"grid {plan.get('grid', '?')}", *narrowed])
        said.append(f"> **FILTERED** ({escape(what)}). Less was asked than a licence needs; this run validates nothing.")
    absent = [r for r in run.records if r.check == "all" and r.status == "skip"]
    if absent:
        lines = ["> **NOT RUN HERE.** These were not judged at all:", ">"]
        lines += [f"> - {escape(r.subject)}: {bold(r.implementation)}{tables.mark(r)}: {escape(r.reason)}" for r in absent]
        said.append("\n".join(lines))
    return ["## Not run here", *(said or ["Nothing is missing: every implementation ran, unfiltered, to the end."])]


def _video(run: Run) -> str:
    """Return how many cases used a real video, and which: real input is a claim of its own."""
    judged = [r for r in run.records if r.status != "skip" and "video" in r.case.split("-")]
    cases = {(r.subject, r.case) for r in judged}
    if not cases:
        return "No case used frames of a real video."
    chosen = run.about.get("plan", {}).get("video")
    file = code(chosen) if chosen else f"the shipped clip, `{SHIPPED.name}`"
    return f"{len(cases)} {'case' if len(cases) == 1 else 'cases'} used frames of a real video: {file}."


def box(run: Run) -> str:
    """Return the box, the code and the plan as a table."""
    about, found = run.about, run.about.get("box", {})
    git = found.get("git", {})
    state = {True: "WITH CHANGES", False: "clean", None: "unknown whether changed"}[git.get("dirty")]
    rows: list[tuple[str, Any]] = [(k, found[k]) for k in found if k not in ("packages", "fingerprints", "settings", "git")]
    rows += [("git", f"{git.get('commit') or 'no commit known'}, {state}")]
    rows += [("accepted at commit", about["commit"])] if "commit" in about else []
    for group in ("packages", "fingerprints", "settings"):
        rows.append((group, ", ".join(f"{k} {'none' if v is None else v}" for k, v in found.get(group, {}).items())))
    rows += [(k, about.get(k, "?")) for k in ("started", "ended")]
    rows += [("sessions", said)] if (said := _sessions(run)) else []
    rows += [("SOURCES CHANGED DURING THE RUN", "; ".join(found))] if (found := sessions.changed_sources(about)) else []
    rows.append(("wall time", _wall(run)))
    rows += [(f"plan: {k}", ", ".join(v) if isinstance(v, list | tuple) else v) for k, v in about.get("plan", {}).items() if v]
    return table(["what", "is"], [(k, "none" if v is None else v) for k, v in rows])


def again(run: Run) -> str:
    """Return the command of the run as a block."""
    return fence(run.about.get("command", "(not recorded; the plan above says what was asked)"))


def _sessions(run: Run) -> str:
    """Return when each session began and how it ended; "" if there was only one."""
    found = sessions.of(run.about)
    parts = [f"{s.get('started', '?')} ({s.get('status', '?')})" for s in found]
    return f"{len(found)}: {', '.join(parts)}" if len(found) > 1 else ""


def _wall(run: Run) -> str:
    """Return the seconds of all sessions that lived to note their end, and of the questions."""
    spent = math.fsum(r.seconds for r in run.records)
    found = sessions.of(run.about)
    times = [(datetime.fromisoformat(s["started"]), datetime.fromisoformat(s["ended"])) for s in found if "ended" in s]
    if not times:
        return f"{spent:.0f} s in questions"
    wall = sum((end - start).total_seconds() for start, end in times)
    unknown = f", and those of {len(found) - len(times)} killed" * (len(times) < len(found))
    return f"{wall:.0f} s from start to end{unknown}, {spent:.0f} s of them in questions"
