"""`python -m harness report`, `compare` and `accept`: commands on runs that are there."""

import tempfile
from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from harness.bench.compare import compare as compare_runs
from harness.judge.request import UsageError
from harness.records import interval
from harness.report import accepted, front, side_by_side
from harness.report.kinds import write
from harness.runs import acceptance, environment, joining
from harness.runs.conclude import FAILED, NOTHING, PASSED
from harness.runs.store import RUNS, Run


def report(
    folder: Annotated[Path | None, typer.Argument(help="a run's folder; the newest by default")] = None,
    new: Annotated[Path | None, typer.Argument(help="another run of its kind: the two side by side on one page")] = None,
    out: Annotated[Path | None, typer.Option(help="folder of the page on two; by default reports/runs/NEW-beside-BASE")] = None,
    every: Annotated[bool, typer.Option("--accepted", help="all accepted runs, and the front page reports/index.html")] = False,
) -> None:
    """Write a run's report again from its records; of two runs, a page that has them side by side."""
    if every:
        if folder or out:
            raise UsageError("--accepted takes no folder: it writes the pages of all runs under reports/accepted")
        for path in sorted(acceptance.ACCEPTED.glob("*/*/run.json")):
            print(write(Run.open(path.parent)))
        for device in sorted(acceptance.ACCEPTED.glob("*/")):
            accepted.refresh(acceptance.ACCEPTED.parent / "README.md", device)
        print(front.write(acceptance.ACCEPTED.parent))
        return
    run = Run.open(folder) if folder else Run.latest()
    if new is None:
        print(write(run))
        return
    other = Run.open(new)
    print(side_by_side.write(run, other, out or RUNS / f"{other.folder.name}-beside-{run.folder.name}"))


def compare(
    base: Annotated[Path, typer.Argument(help="folder of the bench that is the measure")],
    new: Annotated[Path, typer.Argument(help="folder of the bench that is held against it")],
) -> None:
    """Say whether run NEW is faster than run BASE, point by point; exits 1 if ours is SLOWER somewhere, 3 if none compares."""
    changes, left_out = compare_runs(Run.open(base), Run.open(new))
    for c in changes:
        print(f"{c.verdict:7} {c.ratio.middle:6.3f} [{c.ratio.low:.3f}, {c.ratio.high:.3f}]  {' '.join(c.new.key)}")
    for line in left_out:
        print(f"left out: {line}")
    counts = Counter(c.verdict for c in changes)
    print(", ".join(f"{counts[v]} {v}" for v in interval.VERDICTS))
    if not changes:
        raise typer.Exit(NOTHING)
    raise typer.Exit(FAILED if any(c.verdict == "SLOWER" and c.new.entry.role == "ours" for c in changes) else PASSED)


def accept(folders: Annotated[list[Path], typer.Argument(help="runs of this commit; those of one kind become one")]) -> None:
    """Copy finished runs under reports/accepted/DEVICE/ as evidence, if they were made by the code of this commit.

    Runs of one kind, of several calls on one box, are accepted together as one, under the name of the first. Prints the copy,
    and what it covers where that is less than everything or another machine. Exits 2 with the reason for a run that is
    unfinished or planted, in which one of ours failed, whose sources changed or were not committed, or that is no part of the
    others.
    """
    runs = [Run.open(folder) for folder in dict.fromkeys(folders)]
    commits = {id(run): acceptance.commit_of(run) for run in runs}  # of all before anything is written
    kinds = {kind: [run for run in runs if run.about["kind"] == kind] for kind in dict.fromkeys(r.about["kind"] for r in runs)}
    with tempfile.TemporaryDirectory() as work:
        folders = [Path(work, some[0].folder.resolve().name) for some in kinds.values()]
        whole = [joining.join(some, at) if len(some) > 1 else some[0] for some, at in zip(kinds.values(), folders, strict=True)]
        for run, some in zip(whole, kinds.values(), strict=True):
            run.about["commit"] = commits[id(some[0])]
            run.save()
            write(run)
            target = acceptance.keep(run)
            print(target, *acceptance.coverage(run), sep="\n")
            if run.about["kind"] == "bench":
                accepted.refresh(environment.ROOT / "reports" / "README.md", target.parent)
    front.write(environment.ROOT / "reports")
