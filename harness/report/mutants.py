"""The page of a run of `mutants`: the score of each room, what survived, and what nothing can show."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from harness.records.record import Record
from harness.report import markdown
from harness.report.html import write_both
from harness.report.markdown import bold, escape
from harness.report.page import again, box
from harness.runs.store import Run

HOW = """\
Each bug is a change of a few words in a source file, as a commit could have made it. It is planted in a copy of the tree, and
the tests that are nearest run until one fails: the bug is caught. Bugs that these do not find are planted together, a room at a
time, and meet all tests of the room. A test counts only if it passes without the bug. A bug that is *known to survive* names
the test that is missing; it is no success, and lowers the score. An *equivalent* changes nothing that could be seen, by the
argument beside it. The score is the share of caught bugs among those that a CPU can show."""


class Score(NamedTuple):
    """The verdicts on a room's bugs, counted."""

    room: str
    caught: int
    survived: int
    known: int
    equivalent: int
    needs_gpu: int
    broken: int

    @property
    def asked(self) -> int:
        """Return how many a CPU can show."""
        return self.caught + self.survived + self.known

    @property
    def share(self) -> str:
        """Return the score in words."""
        return f"{100 * self.caught / self.asked:.0f} %" if self.asked else "-"


def score(room: str, records: Sequence[Record]) -> Score:
    """Return the score over records, of a room or of all."""
    skipped = [r.reason.partition(":")[0] for r in records if r.status == "skip"]
    caught, survived, broken = (sum(r.status == status for r in records) for status in ("pass", "fail", "error"))
    known, equivalent, needs_gpu = (skipped.count(kind) for kind in ("known to survive", "equivalent", "needs a GPU"))
    return Score(room, caught, survived, known, equivalent, needs_gpu, broken)


def scores(records: Sequence[Record]) -> list[str]:
    """Return a line a room."""
    return [f"{s.room:10} {s.share:>6}  {s.caught} of {s.asked} caught" for s in _rooms(records)]


def one_line(record: Record) -> str:
    """Return a bug that survived, or whose tests do not stand, in a line, and the command that plants it again."""
    said = record.reason or record.findings[0].note
    return f"{'SURVIVED' if record.status == 'fail' else record.status.upper()} {record.case}: {said}\n    {record.command}"


def write(run: Run) -> Path:
    """Write report.md and report.html into the run's folder; return the path of the former."""
    records, counts = run.records, run.counts()
    word = "FAILED" if counts["failed"] else "PASSED" if counts["passed"] else "NOTHING RAN"
    word += f" SO FAR ({run.about.get('status')})" * (run.about.get("status") != "finished")
    title = "Planted bugs"
    if sample := run.about.get("plan", {}).get("sample"):
        title += f", a sample of {sample}"
    survived = [[r.case, r.findings[0].note] for r in records if r.status == "fail"]
    broken = [[r.case, r.reason] for r in records if r.status == "error"]
    parts = [f"# {title}", bold(word + "."), f"`{run.last_line()}`", "## Scores", table(records)]
    parts += ["## Survivors", _list(["bug", "where and what"], survived)]
    parts += ["## Tests that do not stand", _list(["bug", "why"], broken)]
    for heading, kind in (("Known to survive", "known to survive"), ("Equivalent", "equivalent"), ("On a GPU", "needs a GPU")):
        rows = [[r.case, r.reason.partition(": ")[2]] for r in records if r.status == "skip" and r.reason.startswith(kind)]
        parts += [f"## {heading}", _list(["bug", "why"], rows)]
    caught = [[r.case, r.findings[0].note, f"{r.seconds:.1f}"] for r in records if r.status == "pass"]
    parts += ["## Caught", _list(["bug", "by", "seconds"], caught)]
    parts += ["## How to read this", HOW, "## The box", box(run), "## Again", again(run)]
    return write_both(run.folder, "\n\n".join(parts) + "\n", title)


def table(records: Sequence[Record]) -> str:
    """Return a table of the rooms' scores, the sum last."""
    head = ["room", "caught", "survived", "known to survive", "score", "equivalent", "on a GPU", "broken"]
    every = [*_rooms(records), score("all", records)]
    rows = [[s.room, s.caught, s.survived, s.known, s.share, s.equivalent, s.needs_gpu, s.broken] for s in every]
    return markdown.table(head, rows)


def _rooms(records: Sequence[Record]) -> list[Score]:
    rooms = sorted({r.subject for r in records})
    return [score(room, [r for r in records if r.subject == room]) for room in rooms]


def _list(head: list[str], rows: list[list[str]]) -> str:
    return markdown.table(head, rows) if rows else escape("None.")
