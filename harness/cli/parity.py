"""The command line of the judge."""

import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer

import fused
from fused import backends, stamp
from harness.cli.bench import bench, compare
from harness.cli.learn import learn
from harness.judge import parity, registry
from harness.judge.case import Case
from harness.judge.plan import GRIDS, Plan, UsageError, default_device, existing
from harness.records.record import Record
from harness.report import bench as bench_page
from harness.report import learning as learning_page
from harness.report import page
from harness.runs import environment, workers
from harness.runs.conclude import INTERRUPTED, NOTHING, PASSED, UNFIT, USAGE, conclude, exit_code
from harness.runs.progress import Progress
from harness.runs.store import ACCEPTED, Run, StoreError, again, resumable

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__, pretty_exceptions_enable=False)
Many = Annotated[list[str] | None, typer.Option()]


def main() -> None:
    """Run, turning wrong wishes into exit code 2 with one line that says what is allowed."""
    try:
        app()
    except (UsageError, StoreError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(USAGE)


@app.command("list")
def show() -> None:
    """Subjects with their implementations, checks, grids, planted bugs."""
    for name, module in registry.subjects().items():
        print(f"{name:11} {registry.title(module)}")
        for implementation in module.implementations():
            reason = implementation.absent(default_device())
            print(f"    {implementation.name:26} {implementation.role:6} {f'not here: {reason}' if reason else 'runs here'}")
        print("    cases: " + ", ".join(f"{len(module.cases(grid))} {grid}" for grid in GRIDS))
    for what, modules in (("checks", registry.checks()), ("planted bugs (--mutant)", registry.mutants())):
        print(f"{what}:")
        for name, module in modules.items():
            print(f"    {name:22} {registry.title(module)}")


@app.command()
def doctor() -> None:
    """What this box can judge; exits 4 if it cannot judge at all."""
    environment.prepare()
    box = environment.describe(default_device())
    for key, value in box.items():
        print(f"{key:16} {value}")
    print(f"{'fused':16} {environment.whose('fused')}")
    for backend in backends.BACKENDS:
        print(f"{'backend':16} {backend}: {backends.unavailable(backend, default_device()) or 'runs here'}")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        print(f"{'validated':16} {dtype}: {fused.validation(dtype=dtype) or 'no (run: nox -s parity)'}")
    require_fit()


@app.command("parity")
def run_parity(
    grid: Annotated[str, typer.Option(help="smoke, full or long; by default smoke on a CPU, full on a GPU")] = "",
    subject: Many = None,
    check: Many = None,
    impl: Annotated[list[str] | None, typer.Option(help="implementation, shell patterns allowed")] = None,
    dtype: Many = None,
    case: Annotated[list[str] | None, typer.Option(help="case name, shell patterns allowed")] = None,
    device: str = "",
    video: Annotated[str, typer.Option(help="video file for the real-input cases instead of the shipped clip")] = "",
    added: Annotated[list[str] | None, typer.Option("--with", help="SUBJECT:NAME=module:callable[@LAYOUT]")] = None,
    rival: Annotated[list[str] | None, typer.Option(help="implementation that does not decide the exit code")] = None,
    mutant: Annotated[str, typer.Option(help="plant this bug in fused; the run must fail")] = "",
    out: Annotated[Path | None, typer.Option(help="folder of the run")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="continue the newest unfinished run, or that in --out")] = False,
    jobs: Annotated[int, typer.Option(min=0, help="processes that share the cases; 0 chooses")] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="list the cases and what they cost")] = False,
    save_failing: Annotated[bool, typer.Option("--save-failing", help="keep the tensors of failing cases")] = False,
) -> None:
    """Judge implementations against the reference; exits 0 if all of ours passed, 1 if one failed, 3 if nothing ran."""
    require_fit()
    environment.prepare()
    where = existing(device or default_device())
    plan = Plan(
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
    points = plan.points()
    jobs = jobs or max(1, min(workers.fitting(where), len(points)))
    plan = replace(plan, threads=max(1, torch.get_num_threads() // jobs))
    if dry_run:
        raise typer.Exit(list_cases(plan, points))
    box = environment.describe(where)
    if resume:
        run = Run.open(out) if out else Run.latest(unfinished=True, kind="parity")
        resumable(run, parity.about(plan, box))
    else:
        run = Run.create(out, parity.about(plan, box) | {"command": again(sys.argv[1:])})
    print(f"{len(points)} cases of grid {plan.grid} on {box['gpu'] or box['cpu']}, into {run.folder}", flush=True)
    if mutant:
        print(f"A BUG IS PLANTED in fused: {mutant}. This run must fail.", flush=True)
    raise typer.Exit(judge(plan, run, save_failing, jobs))


def judge(plan: Plan, run: Run, save_failing: bool, jobs: int) -> int:
    """Run, report, stamp; the exit code."""
    progress = Progress({c.name + c.subject: parity.cost(plan, c) for c in plan.points()})
    done = conclude(run, progress, lambda: parity.run_parity([plan], run, teller(progress), save_failing, jobs), page.write)
    if not done:
        print(run.last_line())
        return INTERRUPTED
    for backend, dtype in parity.stamps(plan, run):
        print(f"validated: {backend}, {dtype}")
    code = exit_code(run)
    if code == NOTHING:
        reasons = sorted({f"{r.implementation}: {r.reason}" for r in run.records if r.reason})
        print("nothing ran:", *(reasons or ["the options leave no question"]), sep="\n    ")
    print(run.last_line())
    return code


def teller(progress: Progress) -> Callable[[Case, Record | None], None]:
    """Prints failing records with the command that reruns them, and moves the progress on."""

    def tell(case: Case, record: Record | None) -> None:
        if record is None:
            progress.done(case.name + case.subject, f"{case.subject} {case.name}")
        elif record.failed:
            worst = record.worst
            detail = record.reason
            if worst:
                detail = f"{worst.tensor} {worst.norm} {worst.error:.3g}, may be {worst.budget:.3g}"
                detail += f"; {worst.note}" * bool(worst.note)
            progress.say(f"{record.status.upper()} ({record.role}) {record.check} {record.subject} {record.implementation} "
                         f"{record.case}: {detail}\n    {record.command}")  # fmt: skip

    return tell


def list_cases(plan: Plan, points: list[Case]) -> int:
    """The cases with rough seconds on two CPU cores or one GPU, and the memory of their largest tensors; nothing runs."""
    asked = 0
    for c in points:
        n = len(plan.questions(c))
        asked += n
        print(
            f"{c.subject:11} {c.name:60} {n:3} questions  ~{parity.cost(plan, c) * 6e-5:7.1f} s  ~{parity.memory(c):6.0f} MiB"
        )
    print(f"{len(points)} cases, {asked} questions, about {sum(parity.cost(plan, c) for c in points) * 6e-5 / 60:.1f} minutes")
    return PASSED if asked else NOTHING


app.command()(bench)
app.command()(compare)
app.command()(learn)


@app.command()
def report(folder: Annotated[Path | None, typer.Argument(help="a run's folder; the newest by default")] = None) -> None:
    """Write a run's report again from its records."""
    run = Run.open(folder) if folder else Run.latest()
    print(write_page(run))


def write_page(run: Run) -> Path:
    """The page of a run of any kind."""
    return {"bench": bench_page, "learn": learning_page}.get(run.about["kind"], page).write(run)


@app.command()
def accept(folder: Path) -> None:
    """Copy a finished run under reports/accepted/DEVICE/ as evidence, if it was made by the code of this commit."""
    run = Run.open(folder)
    now = environment.git()
    prints = {name: stamp.fingerprint(name) for name in ("reference", "fused", "harness")}
    if run.about.get("status") != "finished" or run.about["plan"].get("mutant"):
        raise UsageError(f"{folder} is not a finished run of the product itself")
    if now["commit"] is None or now["dirty"]:
        raise UsageError("reference, fused and harness must stand in git as they are here: commit first")
    if prints != run.about["box"]["fingerprints"]:
        raise UsageError(f"{folder} was made by other code than commit {now['commit'][:10]}")
    run.about["commit"] = now["commit"]
    run.save()
    write_page(run)
    name = (run.about["box"]["gpu"] or "cpu").lower().replace("nvidia ", "").replace(" ", "-")
    target = ACCEPTED / name / folder.resolve().name
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns("failing", "*.part"), dirs_exist_ok=True)
    print(target)
    if run.about["kind"] == "bench":
        runs = {f.parent: Run.open(f.parent) for f in sorted(target.parent.glob("*/run.json"))}
        benches = {f.relative_to(environment.ROOT): r for f, r in runs.items() if r.about["kind"] == "bench"}
        bench_page.refresh(environment.ROOT / "README.md", benches)


def require_fit() -> None:
    """Exit 4 with the reasons if this box cannot judge."""
    if reasons := environment.unfit():
        print("\n".join(f"unfit: {reason}" for reason in reasons), file=sys.stderr)
        raise typer.Exit(UNFIT)
