"""`python -m harness mutants`."""

import random
import sys
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Annotated

import typer

from harness.cli.options import Names, Out, Resume
from harness.judge.request import require_device, require_known
from harness.records.record import Record
from harness.report import mutants as page
from harness.runs import environment, workers
from harness.runs.conclude import INTERRUPTED, PASSED, conclude, exit_code, nothing_ran
from harness.runs.progress import Progress
from harness.runs.store import begin, require_writable, unfinished
from harness.source_mutants import catalogue
from harness.source_mutants.campaign import CHECK, Campaign
from harness.source_mutants.catalogue import SourceMutant


def mutants(
    room: Annotated[Names, typer.Option(help=f"{', '.join(catalogue.ROOMS)}; all by default")] = None,
    case: Annotated[Names, typer.Option(help="name of a bug, shell patterns allowed (--dry-run lists them)")] = None,
    sample: Annotated[int, typer.Option(min=0, help="so many that a test has found, drawn by the commit; 0 takes all")] = 0,
    device: Annotated[str, typer.Option(help="cpu, or cuda: then only bugs that need a GPU, and their narrow tests")] = "cpu",
    narrow: Annotated[bool, typer.Option("--narrow", help="only the tests that a bug names; what they miss survives")] = False,
    out: Out = None,
    resume: Resume = False,
    jobs: Annotated[int, typer.Option(min=0, help="copies of the tree that are tested at once; 0 takes one a core")] = 0,
    note: Annotated[bool, typer.Option("--note-killers", help="write into the data which test found each bug")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="list the bugs")] = False,
) -> None:
    """Plant bugs in a copy of the sources, one at a time; exits 0 if the tests find all, 1 if one survives, 3 if nothing ran.

    Bugs that are argued to be equivalent or are known to survive are listed and decide nothing, as those are that need a GPU,
    unless the device is one.
    """
    if out or not dry_run:
        require_writable(out)
    require_known("room", room or (), catalogue.ROOMS)
    gpu = device != "cpu"
    if gpu and not dry_run:
        require_device(device)
    git = environment.git()
    every = [m for m in catalogue.read() if not gpu or m.needs_gpu]
    chosen = choose(every, tuple(room or ()), tuple(case or ()), sample, str(git["commit"]))
    if not chosen:
        raise typer.Exit(nothing_ran(["the options leave no bug; --dry-run lists them"]))
    if dry_run:
        print(*(f"{m.room:9} {m.name}" for m in chosen), f"{len(chosen)} bugs", sep="\n")
        raise typer.Exit(PASSED)
    earlier = unfinished(out, CHECK) if resume else None
    plan = {"rooms": room or [], "cases": case or [], "sample": sample, "narrow": narrow}
    plan |= {"commit": git["commit"], "device": device}
    run = begin({"kind": CHECK, "plan": plan, "box": environment.describe(device)}, sys.argv[1:], out, earlier)
    print(f"{len(chosen)} bugs, into {run.folder}", flush=True)
    answered = {r.case for r in run.records}
    left = [m for m in chosen if m.name not in answered]
    progress = Progress({m.name: 1.0 for m in left})

    def tell(record: Record) -> None:
        run.add(record)
        if record.failed:
            progress.say(page.one_line(record))
        progress.done(record.case, record.case)

    wide = {} if narrow or gpu else catalogue.ROOMS
    campaign = Campaign(environment.ROOT, jobs or workers.processes_for(device), tell, wide, gpu)
    done = conclude(run, progress, lambda: campaign.run(left), page.write)
    if note:
        catalogue.note_killers({r.case: r.findings[0].note for r in run.records if r.status == "pass"})
    print(*page.scores(run.records), run.last_line(), sep="\n")
    raise typer.Exit(exit_code(run) if done else INTERRUPTED)


def choose(
    every: Sequence[SourceMutant], rooms: tuple[str, ...], cases: tuple[str, ...], sample: int, seed: str
) -> list[SourceMutant]:
    """Return the bugs that the options leave, in order; of a sample those that `seed`, a commit, draws.

    A sample is of bugs with a killer: what no run has found yet cannot be lost.
    """
    asked = [m for m in every if (not rooms or m.room in rooms) and (not cases or any(fnmatchcase(m.name, c) for c in cases))]
    asked = [m for m in asked if m.killer] if sample else asked
    drawn = {m.name for m in random.Random(seed).sample(asked, min(sample, len(asked)) or len(asked))}
    return [m for m in asked if m.name in drawn]
