"""The page of a parity run: the verdict and its map first, the evidence below, the raw answers folded."""

import math
from datetime import datetime
from pathlib import Path
from typing import Any

from harness.fixtures.video import SHIPPED
from harness.judge import registry
from harness.judge.check import checks
from harness.records.record import Record
from harness.report import deviation, error_growth, faults, glossary, html, margins, tables, training, words
from harness.report.figures import shown
from harness.report.html import Number, Page, Section
from harness.report.markdown import bold, code, escape, fence, sparse, table
from harness.runs import sessions
from harness.runs.store import Run

RULE = """\
There is one tolerance rule and no hand-typed tolerance. Truth is the reference in float64, plain is the reference in the
case's own precision. An implementation may be wrong by twice what plain is wrong by, plus one unit roundoff of the truth's
size (of the dtype in which plain returns the tensor, plus 8 unit roundoffs of float32 for a hardware exp2; none in float64):
that is one budget, and an error above 1 budget fails. Every output, state and gradient is held to it in two norms, L2 and
max-abs, each pooled (root mean square) over the seeds; where truth and plain are exactly 0, exactly 0 is due (`zero`), and
NaN or infinity never passes. `inf` budgets means an error where none is allowed, or no number at all."""

COUNTED = """\
`error`, `oom` and `timeout` count as failed. A skip is no pass: it says that a question was not asked, and why.
Rivals are judged by the same rule and shown as plainly, but do not decide the exit code."""


NARROWING = {"subjects": "subjects", "checks": "checks", "names": "implementations", "dtypes": "dtypes", "cases": "cases"}
TIGHTEST = """\
The ten errors of ours that are the largest share of their budget. A budget is what an error may be; above 1 the answer fails.
The element named is where the error is largest."""

ERRORS = """\
The scan's error against its length: of each case the worst tensor in L2, as a share of the truth's norm, pooled over the seeds.
The grey line is the least budget at a length.

"""

APPROXIMATE = """\
What `forward_approximate` gives differs from the exact result, by its nature: the backward direction does not know what comes.
Measured on weights that were drawn, not trained; it is not held to any budget.

"""

TRAININGS = """\
The same short training, started from the same numbers: by the reference in float64 (truth), by the reference in the case's own
precision (plain), and by each implementation: the loss, and how far the parameters are from those of the truth, as a share of
their norm. Plain was run four times, from parameters moved by one unit in the last place of float32 and with clips moved by
one rounding: the grey lines are what rounding alone makes of a training. An implementation may be twice as far off as the
farthest of them, after every step; one that leaves the grey area fails. `convergence` also judges single steps, by the rule.

"""


def write(run: Run) -> Path:
    """Write report.md, its figures and report.html into the run's folder; return the path of report.md."""
    plan, here = run.about.get("plan", {}), run.about.get("box", {})
    where = here.get("gpu") or here.get("cpu") or "?"
    title = f"Parity on {where}, grid {plan.get('grid', '?')}, {str(run.about.get('started', '?'))[:10]}"
    records, folder = run.records, run.folder
    ours, rivals = ([r for r in records if r.role == role] for role in ("ours", "rival"))
    drawn = error_growth.against_length(records, folder)
    near, trained = deviation.approximate(records, folder), training.trainings(records, folder)
    missing = [r for r in records if r.status == "skip"]
    sections = [
        Section("How tight", "\n\n".join([shown(margins.margins(records, folder)), TIGHTEST, margins.tightest(ours)])),
        Section("How it was judged", how(records), folded=True),
        Section("What failed", "\n\n".join([_by_kind(ours, rivals), tables.failures(ours, "Nothing of ours.")])),
        *([Section("Failures of rivals", tables.failures(rivals), folded=True)] if any(r.failed for r in rivals) else []),
        Section("What was not run", "\n\n".join([_not_run(run), tables.skips(records), _video(run)]), folded=not missing),
        *([Section("Error against length", ERRORS + shown(drawn), folded=True)] if drawn else []),
        *([Section("The approximate online mode", APPROXIMATE + shown(near), folded=True)] if near else []),
        *([Section("Trainings", TRAININGS + shown(trained), folded=True)] if trained else []),
        Section("Worst cases of every check and implementation", margins.worst_of_cells(records), folded=True),
        Section("All answers, by subject", _matrices(records), folded=True),
        Section("The box", box(run), folded=True),
        Section("How to repeat it", again(run)),
        Section("Glossary", glossary.terms(), folded=True),
    ]  # fmt: skip
    chart = shown(margins.heat_map(records, folder)) or "No question was answered."
    return html.write(folder, Page(title, "\n\n".join([verdict(run), *_warnings(run)]), numbers(run), chart, sections))


def how(records: list[Record]) -> str:
    """Return the tolerance rule, the question of every check that was asked, and what counts as failed."""
    asked = {r.check for r in records if r.status != "skip"}
    questions = [f"- `{name}`: {registry.title(check)}" for name, check in checks().items() if name in asked]
    return "\n\n".join([RULE, "\n".join(questions), COUNTED])


def verdict(run: Run) -> str:
    """Return the verdict as a sentence."""
    ours = run.counts()
    asked, found = ours["passed"] + ours["failed"], margins.spent(r for r in run.records if r.role == "ours")
    if not asked:
        return "Nothing of ours was judged." + _so_far(run)
    if ours["failed"]:
        said = f"{ours['failed']:,} of {asked:,} answers of our implementations failed"
        said += f": {faults.in_words([r for r in run.records if r.role == 'ours'])}."
    else:
        which = "The one answer" if asked == 1 else f"All {asked:,} answers"
        said = (
            f"{which} of our implementations {'is' if asked == 1 else 'are'} as close to the reference as the tolerance demands"
        )
        share = found[0].finding.ratio if found else 0.0
        said += f"; the tightest, {escape(_where(found[0]))}, uses {100 * share:.3g} % of its budget." if share else ""
        said += "; all are exact." * (not share)
    return said + _so_far(run)


def in_short(run: Run) -> str:
    """Return the day and the verdict of a run whose answers of ours all passed in few words; of others the verdict."""
    counts, found = run.counts(), margins.spent(r for r in run.records if r.role == "ours")
    day = str(run.about.get("started", "?"))[:10]
    if counts["failed"] or not counts["passed"] or not found:
        return f"Parity on {day}: {verdict(run)}"
    asked = "the one answer" if counts["passed"] == 1 else f"all {counts['passed']:,} answers"
    tightest = f"the tightest at {100 * found[0].finding.ratio:.3g} % of its budget"
    return f"Parity on {day}: {asked} within the tolerance, {tightest}."


def _where(spent: margins.Spent) -> str:
    """Return which answer a finding is of, in words."""
    tensor, record = spent.finding.tensor, spent.record
    what = f"the gradient of {tensor.removeprefix('grad ')}" if tensor.startswith("grad ") else tensor
    return f"{what} ({record.subject}, check {record.check})"


def numbers(run: Run) -> list[Number]:
    """Return the large numbers: passed, the tightest, rivals by kind, and what was not asked."""
    ours, rivals = run.counts(), run.counts("rival")
    found = [Number(f"{ours['passed']:,}", f"of {ours['passed'] + ours['failed']:,}", "answers of ours passed")]
    if spent := margins.spent(r for r in run.records if r.role == "ours"):
        wrong = [s for s in spent if not s.finding.passed] or spent
        f, r = largest = next((s for s in wrong if math.isfinite(s.finding.ratio)), wrong[0])
        who = f"is the largest error of ours, 1 is the limit: {_where(largest)} by {words.implementation(r.implementation)}"
        found.append(Number(tables.number(f.ratio), "budgets", who))
    for name in dict.fromkeys(r.implementation for r in run.records if r.role == "rival" and r.status != "skip"):
        mine = [r for r in run.records if r.implementation == name and r.status != "skip"]
        why = ", ".join(f"{n} {kind}" for kind, n in faults.counted(mine).items())
        label = f"answers of {words.implementation(name, mine[0].subject)}, a rival, passed" + f"; {why}" * bool(why)
        found.append(Number(f"{sum(r.status == 'pass' for r in mine):,}", f"of {len(mine):,}", label))
    skipped = ours["skipped"] + rivals["skipped"]
    word, where = "question was" if skipped == 1 else "questions were", ", for the reasons below" * bool(skipped)
    return [*found, Number(f"{skipped:,}", "", f"{word} not asked here{where}")]


def _so_far(run: Run) -> str:
    status = run.about.get("status")
    return f" So far: the run is {escape(status)}." * (status != "finished")


def _by_kind(ours: list[Record], rivals: list[Record]) -> str:
    """Return how many answers of each implementation failed in which way, as a table."""
    rows = []
    for r in dict.fromkeys((r.implementation, r.role) for r in [*ours, *rivals] if r.failed):
        mine = [m for m in [*ours, *rivals] if (m.implementation, m.role) == r and m.status != "skip"]
        outside = [f for m in mine if m.failed and (f := faults.of(m)).kind == faults.OUTSIDE]
        factor, relative = (f"{max(values):.3g}" if (values := [f[i] for f in outside]) else "-" for i in (1, 2))
        counts = faults.counted(mine)
        rows.append([r[0] + " (rival)" * (r[1] == "rival"), len(mine), sum(m.failed for m in mine),
                     *(counts.get(k, "-") for k in faults.KINDS), factor, relative])  # fmt: skip
    head = ["implementation", "asked", "failed", *faults.KINDS, "largest error in budgets", "its relative error"]
    return sparse(head, rows) if rows else ""


def _matrices(records: list[Record]) -> str:
    subjects = dict.fromkeys(r.subject for r in records)
    return (
        "\n\n".join(f"### {escape(s)}\n\n{tables.matrix([r for r in records if r.subject == s])}" for s in subjects) or "None."
    )


def _not_run(run: Run) -> str:
    """Return the implementations that were not judged at all, with the reasons."""
    absent = [r for r in run.records if r.check == "all" and r.status == "skip"]
    lines = [f"- {escape(r.subject)}: {bold(r.implementation)}{tables.mark(r)}: {escape(r.reason)}" for r in absent]
    return "\n".join(["These implementations were not judged at all:", "", *lines]) if lines else "Every implementation ran."


def _warnings(run: Run) -> list[str]:
    """Return the limits of the verdict, a paragraph each."""
    plan, said = run.about.get("plan", {}), []
    if mutant := plan.get("mutant"):
        caught = "it was caught" if run.counts()["failed"] else "it was not caught"
        said.append(f"> {bold(f'A bug was planted in fused: {mutant}')} ({caught}). This run says nothing of the product.")
    if run.about.get("status") == "interrupted":
        said.append("> **Interrupted.** Questions are missing; nothing below is the whole answer.")
    elif run.about.get("status") != "finished":
        said.append(f"> **Not finished** (status: {escape(run.about.get('status'))}). Questions are missing.")
    if run.about.get("filtered"):
        narrowed = [f"{word} {', '.join(plan[k])}" for k, word in NARROWING.items() if plan.get(k)]
        what = "; ".join([f"grid {plan.get('grid', '?')}", *narrowed])
        said.append(f"> **A part of the questions** ({escape(what)}). It speaks for these alone; the rest is not judged here.")
    return said


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
    """Return the command of the run as a block, and which commit's checkout it ran in."""
    commit = run.about.get("commit") or run.about.get("box", {}).get("git", {}).get("commit")
    where = f"From a checkout of commit {code(str(commit)[:10])}, after `pip install -e .[harness]`:\n\n" if commit else ""
    return where + fence(run.about.get("command", "(not recorded; the plan above says what was asked)"))


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
