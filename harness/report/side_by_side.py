"""Two runs side by side: what each says, how they differ, and the verdict."""

import math
from collections import Counter
from pathlib import Path

from harness.bench.compare import compare
from harness.records import interval
from harness.report import bench, glossary, html, parity, things
from harness.report.figures import INK, Drawing, chart, legend, line_look, logarithmic, shown
from harness.report.html import Number, Page, Section
from harness.report.markdown import escape, fence, table
from harness.runs.store import Run, StoreError

WORDS = {
    "FASTER": "are faster", "SAME": "take the same time, within 2 %", "SLOWER": "are slower",
    "UNSURE": "vary too much to tell",
}  # fmt: skip


def write(base: Run, new: Run, folder: Path) -> Path:
    """Write report.md and report.html of two runs of one kind into a folder; return the path of the former.

    Raises StoreError for runs of two kinds, or of one that has no comparison.
    """
    kinds = [str(run.about.get("kind")) for run in (base, new)]
    if kinds not in (["bench"] * 2, ["parity"] * 2):
        raise StoreError(f"runs of {' and '.join(kinds)} have no comparison; give two of bench, or two of parity")
    folder.mkdir(parents=True, exist_ok=True)
    made = _benches(base, new, folder) if kinds[0] == "bench" else _parities(base, new, folder)
    said = bench.verdict if kinds[0] == "bench" else parity.verdict
    both = (("base", base), ("new", new))
    rows = [(word, run.folder.name, run.about["started"][:16], _code(run), said(run)) for word, run in both]
    sections = [
        Section("The two runs", table(["", "run", "started", "code of", "says"], rows)),
        *made.sections,
        Section("How to repeat it", fence(f"python -m harness report {base.folder} {new.folder}")),
        Section("Glossary", glossary.terms(), folded=True),
    ]
    return html.write(folder, Page(made.title, made.verdict, made.numbers, made.chart, sections))


def _code(run: Run) -> str:
    git = run.about.get("box", {}).get("git", {})
    return str(run.about.get("commit") or git.get("commit") or "?")[:10]


def _benches(base: Run, new: Run, folder: Path) -> Page:
    changes, left_out = compare(base, new)
    ours = [c for c in changes if c.new.entry.role == "ours"]
    counts = Counter(c.verdict for c in ours)
    numbers = [Number(str(counts[v]), f"of {len(ours)}", f"points of ours {WORDS[v]}") for v in interval.VERDICTS]
    rows = [
        (c.new.point.name, c.new.entry.name, f"{c.ratio.middle:.3f}", f"[{c.ratio.low:.3f}, {c.ratio.high:.3f}]", c.verdict)
        for c in sorted(changes, key=lambda c: (c.new.entry.role == "rival", -c.ratio.middle))
    ]
    drawn = []
    if ours:
        with chart(folder, "sides") as axes:
            looks = {c.new.entry.implementation: things.of(c.new.entry) for c in ours}
            for c in ours:
                look = line_look(things.of(c.new.entry)) | {"linewidth": 0}
                axes.plot(1e3 * c.new.median.middle, c.ratio.middle, **look)
            axes.axhline(1, color="0.5", linewidth=1)
            axes.set(xscale="log", xlabel="ms a call", ylabel="time over that of the base")
            logarithmic(axes.xaxis)
            legend(axes, looks.values(), linewidth=0)
        drawn.append(Drawing(folder / "sides.svg", "Times of ours over those of the base; below 1 the new run is faster."))
    sections = [
        Section("Every point", table(["point", "entry", "time / base's", "95 %", "verdict"], rows)),
        Section("Left out", "\n".join(f"- {escape(line)}" for line in left_out) or "Nothing.", folded=True),
    ]
    said = ", ".join(f"{counts[v]} {WORDS[v]}" for v in interval.VERDICTS)
    title = f"{new.folder.name} beside {base.folder.name}"
    return Page(title, f"Of {len(ours)} points of ours {said}.", numbers, shown(drawn), sections)


def _parities(base: Run, new: Run, folder: Path) -> Page:
    before, after = ({r.key: r for r in run.records} for run in (base, new))
    both = [key for key in after if key in before]
    changed = [key for key in both if before[key].status != after[key].status]
    worse = [key for key in changed if after[key].failed and not before[key].failed and after[key].role == "ours"]
    tighter = []
    for key in both:
        a, b = before[key].worst, after[key].worst
        if a and b and a.ratio != b.ratio:
            tighter.append((b.ratio - a.ratio, key, a.ratio, b.ratio))
    tighter.sort(key=lambda line: -abs(line[0]))
    rows = [[*key, before[key].status, after[key].status] for key in changed]
    head = ["subject", "implementation", "check", "case", "base", "new"]
    numbers = [
        Number(str(len(worse)), "", "answers of ours fail now that did not before"),
        Number(str(len(changed)), f"of {len(both):,}", "common answers have another status"),
        Number(str(len(after) - len(both)), "", f"questions are new; {len(before) - len(both)} are gone"),
    ]
    said = "1 answer of ours fails" if len(worse) == 1 else f"{len(worse) or 'No'} answers of ours fail"
    said += " now that did not before."
    said += f" {len(tighter):,} of {len(both):,} common answers have another error."
    sections = [
        Section("Other answers", table(head, rows) if rows else "None."),
        Section("Largest changes of errors, in budgets",
                table(head, [[*key, f"{a:.3g}", f"{b:.3g}"] for _, key, a, b in tighter[:20]]) if tighter else "None."),
    ]  # fmt: skip
    drawn = _errors([(key[1], a, b) for _, key, a, b in tighter], folder)
    return Page(f"{new.folder.name} beside {base.folder.name}", said, numbers, shown(drawn), sections)


def _errors(changed: list[tuple[str, float, float]], folder: Path) -> list[Drawing]:
    """Draw the errors of answers in the new run against those in the base, in budgets; nothing where none has another error."""
    positive = [(name, a, b) for name, a, b in changed if 0 < a < math.inf and 0 < b < math.inf]
    if not positive:
        return []
    with chart(folder, "sides") as axes:
        for name, a, b in positive:
            axes.plot(a, b, **line_look(things.look(name)) | {"linewidth": 0})
        ends = [min(min(a, b) for _, a, b in positive) / 1.2, max(max(a, b) for _, a, b in positive) * 1.2]
        axes.plot(ends, ends, color="0.5", linewidth=1)
        axes.axhline(1, color=INK, linewidth=1)
        axes.set(xscale="log", yscale="log", xlabel="base: error in budgets", ylabel="new: error in budgets")
        for axis in (axes.xaxis, axes.yaxis):
            logarithmic(axis)
        legend(axes, [things.look(name) for name in dict.fromkeys(name for name, _, _ in positive)], linewidth=0)
    said = "The worst error of each changed answer. Below the grey line the new one is nearer; above the black one it fails."
    return [Drawing(folder / "sides.svg", said)]
