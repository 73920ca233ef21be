"""The page of a run of `sanitize`: what each tool found in the kernels of each subject."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.patches import Rectangle

from harness.records.record import Record
from harness.report import glossary, html
from harness.report.figures import Drawing, chart, shown
from harness.report.html import Number, Page, Section
from harness.report.margins import COLOURS
from harness.report.markdown import code, escape, fence, table
from harness.report.parity import again, box
from harness.runs.store import Run

TITLE = "Native kernels under compute-sanitizer"
HOW = """\
The kernels of a subject run once in each of its small cases, in float32 and bfloat16, forward and backward, under each tool.
*memcheck* finds reads and writes outside of memory, *racecheck* threads that touch shared memory with no barrier between,
*synccheck* barriers that not every thread reaches, *initcheck* reads of memory that was never written. Results are not judged
here: that is what `parity` does."""


def said(record: Record) -> str:
    """Return what a tool said."""
    return record.reason or record.findings[0].note


def write(run: Run) -> Path:
    """Write report.md, its figure and report.html into the run's folder; return the path of report.md."""
    records = run.records
    where, day = run.about.get("box", {}).get("gpu") or "?", str(run.about.get("started", "?"))[:10]
    tools, subjects = (sorted({getattr(r, name) for r in records}) for name in ("check", "subject"))
    found = {(r.subject, r.check): r for r in records}
    rows = [[s, *(_cell(found.get((s, t))) for t in tools)] for s in subjects]
    failed = [f"### {r.check} of {r.subject}\n\n{fence(said(r))}\n\n{code(r.command)}" for r in records if r.failed]
    sections = [
        Section("What each tool found", table(["subject", *tools], rows) if rows else "Nothing ran."),
        Section("How it was measured", HOW, folded=True),
        Section("What failed", "\n\n".join(failed) or "None."),
        Section("The box", box(run), folded=True),
        Section("How to repeat it", again(run)),
        Section("Glossary", glossary.terms(), folded=True),
    ]
    drawn = shown([_draw(found, subjects, tools, run.folder)]) if records else "Nothing to draw."
    return html.write(run.folder, Page(f"{TITLE}, {where}, {day}", _verdict(run), _numbers(records), drawn, sections))


def _verdict(run: Run) -> str:
    """Return the verdict as a sentence."""
    wrong, mute = _wrong(run.records), [r for r in run.records if r.status == "error"]
    asked = len(run.records) - len(mute)
    word = f"No tool found an error: {asked} of {asked} runs of kernels are clean." if asked else "Nothing was judged."
    if wrong:
        word = f"{len(wrong)} of {asked} runs of kernels {'has' if len(wrong) == 1 else 'have'} errors."
    if mute:
        word += f" {len(mute)} could not be judged."
    status = run.about.get("status")
    return word + f" So far: the run is {escape(status)}." * (status != "finished")


def _numbers(records: Sequence[Record]) -> list[Number]:
    """Return the large numbers: clean runs, errors, what could not be judged."""
    wrong, mute = _wrong(records), [r for r in records if r.status == "error"]
    asked = len(records) - len(mute)
    return [
        Number(str(asked - len(wrong)), f"of {asked}", "runs of a subject's kernels under a tool are clean"),
        Number(f"{sum(r.findings[0].error for r in wrong):.0f}", "errors", "that the tools report"),
        Number(str(len(mute)), "", f"{'run' if len(mute) == 1 else 'runs'} could not be judged"),
    ]


def _wrong(records: Sequence[Record]) -> list[Record]:
    return [r for r in records if r.status == "fail"]


def _cell(record: Record | None) -> str:
    if record is None:
        return "-"
    if record.status == "error":
        return "not judged"
    return escape(f"{record.findings[0].error:.0f} errors in {record.seconds:.0f} s")


def _draw(found: dict[tuple[str, str], Record], subjects: list[str], tools: list[str], folder: Path) -> Drawing:
    """Draw a map of tools by subjects with the number of errors in each cell."""
    with chart(folder, "tools", 1.6 + 0.95 * max(3, len(tools)), 0.75 + 0.28 * len(subjects)) as axes:
        for y, subject in enumerate(subjects):
            for x, tool in enumerate(tools):
                if (record := found.get((subject, tool))) is None:
                    continue
                fill = COLOURS[-1][1] if record.failed else COLOURS[1][1]
                axes.add_patch(Rectangle((x - 0.48, y - 0.46), 0.96, 0.92, facecolor=fill, linewidth=0))
                text = "not judged" if record.status == "error" else f"{record.findings[0].error:.0f}"
                axes.text(x, y, text, ha="center", va="center", fontsize=7.5, color="#111111")
        axes.set(xlim=(-0.5, max(3, len(tools)) - 0.5), ylim=(len(subjects) - 0.5, -0.5))
        axes.set_xticks(range(len(tools)), tools, fontsize=8)
        axes.set_yticks(range(len(subjects)), subjects)
        axes.xaxis.tick_top()
        axes.tick_params(length=0)
        axes.grid(False)
        axes.spines[:].set_visible(False)
    return Drawing(folder / "tools.svg", "Errors by subject and tool; orange: errors, or not judged.")
