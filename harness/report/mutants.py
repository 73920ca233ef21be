"""The page of a run of `mutants`: the score of each room, what survived, and what nothing can show."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from matplotlib.patches import Patch

from harness.records.record import Record
from harness.report import glossary, html, things
from harness.report.figures import Drawing, below, chart, shown
from harness.report.html import Number, Page, Section
from harness.report.markdown import frame, table
from harness.report.parity import again, box
from harness.runs.store import Run

HOW = """\
Each bug is a change of a few words in a source file, as a commit could have made it. It is planted in a copy of the tree, and
the tests that are nearest run until one fails: the bug is caught. Bugs that these do not find are planted together, a room at a
time, and meet all tests of the room. A test counts only if it passes without the bug. A bug that is *known to survive* names
the test that is missing; it is no success, and lowers the score. An *equivalent* changes nothing that could be seen, by the
argument beside it. The score is the share of caught bugs among those that a CPU can show."""
CAUGHT, SURVIVED, KNOWN, EQUIVALENT, GPU, BROKEN = (
    "caught", "survived", "known to survive", "equivalent", "on a GPU", "broken"
)  # fmt: skip
ASKED = (CAUGHT, SURVIVED, KNOWN)  # what a CPU can show
SKIPPED = {"known to survive": KNOWN, "equivalent": EQUIVALENT, "needs a GPU": GPU}  # by the first words of the reason
COLOURS = {CAUGHT: things.LOOKS["fused:native"].colour, KNOWN: "#E69F00", SURVIVED: "#D55E00"}
ALL = "all"


def verdict_on(record: Record) -> str:
    """Return what came of a bug."""
    if record.status == "skip":
        return SKIPPED[record.reason.partition(":")[0]]
    return {"pass": CAUGHT, "fail": SURVIVED}.get(record.status, BROKEN)


def counts(records: Sequence[Record]) -> pd.DataFrame:
    """Return how many bugs there are of each verdict, a row a room and the sum last, with the score in words."""
    found = pd.DataFrame([(r.subject, verdict_on(r)) for r in records], columns=["room", "verdict"])
    rooms = pd.crosstab(found.room, found.verdict).reindex(columns=[*ASKED, EQUIVALENT, GPU, BROKEN], fill_value=0)
    rooms.loc[ALL] = rooms.sum().astype(int)
    asked = rooms[list(ASKED)].sum(axis=1)
    rooms.insert(3, "score", [f"{100 * n / of:.0f} %" if of else "-" for n, of in zip(rooms[CAUGHT], asked, strict=True)])
    return rooms


def scores(records: Sequence[Record]) -> list[str]:
    """Return a line a room."""
    rooms = counts(records).drop(ALL)
    return [
        f"{room:10} {line['score']:>6}  {line[CAUGHT]} of {line[list(ASKED)].sum()} caught" for room, line in rooms.iterrows()
    ]


def one_line(record: Record) -> str:
    """Return a bug that survived, or whose tests do not stand, in a line, and the command that plants it again."""
    said = record.reason or record.findings[0].note
    return f"{'SURVIVED' if record.status == 'fail' else record.status.upper()} {record.case}: {said}\n    {record.command}"


def write(run: Run) -> Path:
    """Write report.md, its figure and report.html into the run's folder; return the path of report.md."""
    records = run.records
    title = "Planted bugs"
    if sample := run.about.get("plan", {}).get("sample"):
        title += f", a sample of {sample}"
    rooms = counts(records)

    def listed(verdict: str, head: list[str]) -> str:
        mine = [r for r in records if verdict_on(r) == verdict]
        rows = [[r.case, r.findings[0].note if r.findings else r.reason.partition(": ")[2] or r.reason] for r in mine]
        if verdict == CAUGHT:
            rows = [[*row, f"{r.seconds:.1f}"] for row, r in zip(rows, mine, strict=True)]
        return table(head, rows) if rows else "None."

    sections = [
        Section("Scores", frame(rooms)),
        Section("Survivors", listed(SURVIVED, ["bug", "where and what"])),
        Section("Tests that do not stand", listed(BROKEN, ["bug", "why"])),
        Section("Known to survive", listed(KNOWN, ["bug", "the test that is missing"])),
        Section("Equivalent", listed(EQUIVALENT, ["bug", "why nothing can show it"]), folded=True),
        Section("On a GPU", listed(GPU, ["bug", "why a CPU cannot show it"]), folded=True),
        Section("Caught", listed(CAUGHT, ["bug", "by", "seconds"]), folded=True),
        Section("How it was judged", HOW, folded=True),
        Section("The box", box(run), folded=True),
        Section("How to repeat it", again(run)),
        Section("Glossary", glossary.terms(), folded=True),
    ]
    drawn = shown([_draw(rooms, run.folder)]) if len(rooms) > 1 else "No bug was planted."
    return html.write(run.folder, Page(title, _sentence(run, rooms), _numbers(rooms), drawn, sections))


def _sentence(run: Run, rooms: pd.DataFrame) -> str:
    """Return the verdict."""
    total = rooms.loc[ALL]
    asked = total[list(ASKED)].sum()
    said = f"The tests find {total[CAUGHT]} of {asked} planted bugs." if asked else "No bug was planted that a CPU can show."
    if total[SURVIVED]:
        said += f" {total[SURVIVED]} survived that were thought to be found."
    if total[BROKEN]:
        said += f" {total[BROKEN]} could not be judged, for their tests do not stand without the bug either."
    return said + f" So far: the run is {run.about.get('status')}." * (run.about.get("status") != "finished")


def _numbers(rooms: pd.DataFrame) -> list[Number]:
    """Return the large numbers: the score, survivors, what is known to survive, the weakest room."""
    total = rooms.loc[ALL]
    found = [Number(str(total["score"]), "", f"of the bugs that a CPU can show are caught: {total[CAUGHT]}")]
    found += [
        Number(str(total[SURVIVED]), "", "survived; each is a test that is missing, and fails the run"),
        Number(str(total[KNOWN]), "", "are known to survive; the test that is missing is named"),
        Number(str(total[GPU]), "", "need a GPU, and were not asked here"),
    ]
    parts = rooms.drop(ALL)
    asked = parts[list(ASKED)].sum(axis=1)
    if len(shares := (parts[CAUGHT] / asked)[asked > 0].sort_values()) > 1:
        found.append(Number(str(parts.loc[shares.index[0], "score"]), "", f"in the weakest room, {shares.index[0]}"))
    return found


def _draw(rooms: pd.DataFrame, folder: Path) -> Drawing:
    """Draw a bar a room: the bugs caught, known to survive and survived, with how many of how many are caught."""
    parts = rooms.drop(ALL)
    with chart(folder, "rooms", height=0.9 + 0.34 * len(parts)) as axes:
        left = pd.Series(0, index=parts.index)
        for verdict, colour in COLOURS.items():
            axes.barh(parts.index, parts[verdict], left=left, color=colour, height=0.7)
            left = left + parts[verdict]
        for room, line in parts.iterrows():
            said = f"{line[CAUGHT]} of {left[room]}"
            axes.annotate(said, (left[room], room), (4, 0), textcoords="offset points", va="center")
        axes.margins(x=0.14)
        axes.invert_yaxis()
        axes.grid(False, axis="y")
        axes.set(xlabel="planted bugs")
        below(axes, [Patch(color=colour, label=verdict) for verdict, colour in COLOURS.items()], columns=3)
    return Drawing(folder / "rooms.svg", "Bugs that a CPU can show, by room: found by the tests, or not.")
