"""The page of a run of `sanitize`: what each tool found in the kernels of each subject."""

from pathlib import Path

from harness.records.record import Record
from harness.report import markdown
from harness.report.html import write_both
from harness.report.markdown import bold, escape
from harness.report.page import again, box
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
    """Write report.md and report.html into the run's folder; return the path of the former."""
    counts = run.counts()
    word = "FAILED" if counts["failed"] else "PASSED" if counts["passed"] else "NOTHING RAN"
    word += f" SO FAR ({run.about.get('status')})" * (run.about.get("status") != "finished")
    tools, subjects = (sorted({getattr(r, name) for r in run.records}) for name in ("check", "subject"))
    found = {(r.subject, r.check): r for r in run.records}
    rows = [[s, *(_cell(found.get((s, t))) for t in tools)] for s in subjects]
    parts = [f"# {TITLE}", bold(word + "."), f"`{run.last_line()}`", markdown.table(["subject", *tools], rows)]
    for record in (r for r in run.records if r.failed):
        parts += [f"## {record.check} of {record.subject}", f"```text\n{said(record)}\n```", f"`{record.command}`"]
    parts += ["## How to read this", HOW, "## The box", box(run), "## Again", again(run)]
    return write_both(run.folder, "\n\n".join(parts) + "\n", TITLE)


def _cell(record: Record | None) -> str:
    if record is None:
        return "-"
    if record.status == "error":
        return "not judged"
    return escape(f"{record.findings[0].error:.0f} errors in {record.seconds:.0f} s")
