"""`python -m harness parity`."""

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Annotated

import torch
import typer

from harness.cli.inspect import require_fit
from harness.cli.options import Device, Names, Out, Resume
from harness.judge import stamps
from harness.judge.case import DTYPES, Case
from harness.judge.check import checks
from harness.judge.parity import ContextLost, absent_implementations, cost, describe, memory, run_parity
from harness.judge.registry import subjects
from harness.judge.request import ParityRequest, default_device, require_device
from harness.records.record import Record
from harness.report import parity as page
from harness.runs import environment, workers
from harness.runs.conclude import FAILED, INTERRUPTED, NOTHING, PASSED, conclude, exit_code, nothing_ran
from harness.runs.progress import Progress
from harness.runs.store import Run, begin, require_writable, unfinished

ADDED = "judge your own: SUBJECT:NAME=module:callable, or ...@LAYOUT for another package's memory layout"


def parity(
    grid: Annotated[str, typer.Option(help="smoke, full or long; by default smoke on a CPU, full on a GPU")] = "",
    subject: Annotated[Names, typer.Option(help=f"{', '.join(subjects())}; all by default")] = None,
    check: Annotated[Names, typer.Option(help=f"{', '.join(checks())}; all by default")] = None,
    impl: Annotated[Names, typer.Option(help="implementation, shell patterns allowed (`list` names them)")] = None,
    dtype: Annotated[Names, typer.Option(help=f"{', '.join(DTYPES)}; all by default")] = None,
    case: Annotated[Names, typer.Option(help="name of a case, shell patterns allowed (--dry-run lists them)")] = None,
    device: Device = "",
    video: Annotated[str, typer.Option(help="video file for the real-input cases instead of the shipped clip")] = "",
    added: Annotated[Names, typer.Option("--with", help=ADDED)] = None,
    rival: Annotated[Names, typer.Option(help="implementation that does not decide the exit code, patterns allowed")] = None,
    mutant: Annotated[str, typer.Option(help="plant this bug in fused (`list` names them); the run must fail")] = "",
    out: Out = None,
    resume: Resume = False,
    jobs: Annotated[int, typer.Option(min=0, help="processes that share the cases; 0 chooses")] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="list the cases and what they cost")] = False,
    save_failing: Annotated[bool, typer.Option("--save-failing", help="keep the tensors of failing cases")] = False,
) -> None:
    """Judge implementations against the reference; exits 0 if all of ours passed, 1 if one failed, 3 if nothing ran.

    Where the options leave nothing that can be asked here, no folder is made.
    """
    if out or not dry_run:
        require_writable(out)
    require_fit()
    environment.prepare()
    where = require_device(device or default_device())
    plan = ParityRequest(
        grid=grid or ("full" if where.startswith("cuda") else "smoke"),
        device=where,
        subjects=tuple(subject or ()),
        checks=tuple(check or ()),
        names=tuple(impl or ()),
        dtypes=tuple(dtype or ()),
        cases=tuple(case or ()),
        video=video,
        added=tuple(added or ()),
        rivals=tuple(rival or ()),
        mutant=mutant,
    )
    points = plan.selected_cases()
    jobs = jobs or max(1, min(workers.processes_for(where), len(points)))
    earlier = unfinished(out, "parity") if resume and not dry_run else None
    threads = earlier.about["plan"].get("threads") if earlier else None  # sums depend on their number
    plan = replace(plan, threads=threads or max(1, torch.get_num_threads() // jobs))
    if dry_run:
        raise typer.Exit(list_cases(plan, points))
    if not earlier and (reasons := nothing_to_ask(plan, points)) is not None:
        raise typer.Exit(nothing_ran(reasons))
    box = environment.describe(where)
    run = begin(describe(plan, box), sys.argv[1:], out, earlier)
    print(f"{len(points)} cases of grid {plan.grid} on {box['gpu'] or box['cpu']}, into {run.folder}", flush=True)
    if mutant:
        print(f"A BUG IS PLANTED in fused: {mutant}. This run must fail.", flush=True)
    raise typer.Exit(judge(plan, run, save_failing, jobs))


def nothing_to_ask(plan: ParityRequest, points: list[Case]) -> list[str] | None:
    """Return why no question can be asked here: a reason for each absent implementation, else what fits; None if one can."""
    absent = {(r.subject, r.implementation): f"{r.implementation}: {r.reason}" for r in absent_implementations(plan)}
    here = ((c.subject, i.name) not in absent for c in points for _, _, i in plan.questions(c))
    if any(here):
        return None
    why = f"of the {len(points)} cases that fit none is asked these" if points else f"no case of grid {plan.grid} fits"
    why += " (--dry-run with fewer options lists the cases)"
    return sorted(set(absent.values())) or [f"the options leave no question: {why}"]


def judge(plan: ParityRequest, run: Run, save_failing: bool, jobs: int) -> int:
    """Run, report, stamp; return the exit code."""
    progress = Progress({c.name + c.subject: cost(plan, c) for c in plan.selected_cases()})

    def work() -> None:
        try:
            run_parity([plan], run, teller(progress), save_failing, jobs)
        except ContextLost as lost:
            progress.say(f"this process can use the GPU no more, since {lost}")
            raise KeyboardInterrupt from lost

    done = conclude(run, progress, work, page.write)
    if not done:
        print(run.last_line())
        return INTERRUPTED
    for backend, dtype in stamps.write_stamps(run):
        print(f"validated: {backend}, {dtype}")
    if not plan.filtered and (why := stamps.refusal(run)):
        print(f"validates nothing: {why}")
    if left := stamps.unanswered(run):
        print(f"{left} questions have no answer in {run.folder / 'records.jsonl'}")
    code = FAILED if left else exit_code(run)
    if code == NOTHING:
        nothing_ran(sorted(f"{r.implementation}: {r.reason}" for r in run.records if r.reason))
    print(run.last_line())
    return code


def teller(progress: Progress) -> Callable[[Case, Record | None], None]:
    """Return a function that prints failing records with the command that reruns them, and moves the progress on."""

    judged: set[Case] = set()  # now, not by an earlier session

    def tell(case: Case, record: Record | None) -> None:
        if record is None:
            progress.done(case.name + case.subject, f"{case.subject} {case.name}", known=case not in judged)
            return
        judged.add(case)
        if record.failed:
            worst = record.worst
            detail = record.reason
            if worst:
                detail = f"{worst.tensor} {worst.norm} {worst.error:.3g}, may be {worst.budget:.3g}"
                detail += f"; {worst.note}" * bool(worst.note)
            where = "".join(f"\n    {line}" for line in record.location.lines()) if record.location else ""
            progress.say(f"{record.status.upper()} ({record.role}) {record.check} {record.subject} {record.implementation} "
                         f"{record.case}: {detail}{where}\n    {record.command}")  # fmt: skip

    return tell


def list_cases(plan: ParityRequest, points: list[Case]) -> int:
    """Print the cases with rough seconds on two CPU cores or one GPU, and their largest tensors' memory; run nothing."""
    questions = 0
    for c in points:
        n = len(plan.questions(c))
        questions += n
        print(
            f"{c.subject:11} {c.name:60} {n:3} questions  ~{cost(plan, c) * 6e-5:7.1f} s  ~{memory(c):6.0f} MiB"
        )
    print(f"{len(points)} cases, {questions} questions, about {sum(cost(plan, c) for c in points) * 6e-5 / 60:.1f} minutes")
    return PASSED if questions else NOTHING
