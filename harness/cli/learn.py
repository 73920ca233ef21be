"""`python -m harness learn`."""

import sys
import time
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated

import torch
import typer

from harness.judge.plan import UsageError, default_device, existing
from harness.judge.registry import Implementation
from harness.learning import trained_weights as trained
from harness.learning.fit import Fitted, Look, fit, looked_at
from harness.learning.task import Recipe, Task, allowed
from harness.learning.tasks import TASKS
from harness.records.finding import Finding
from harness.records.record import Record, judged
from harness.report import learning as page
from harness.runs import environment
from harness.runs.conclude import INTERRUPTED, conclude, exit_code
from harness.runs.progress import Progress
from harness.runs.store import Run, again, resumable
from harness.subjects import videomamba

CHECK = "learn"  # what the records say was asked


@dataclass(frozen=True)
class Course:
    """One training that is asked for."""

    task: Task
    recipe: Recipe
    implementation: Implementation
    seed: int

    @property
    def case(self) -> str:
        """What is the same for all implementations."""
        return f"steps{self.recipe.steps}-batch{self.recipe.batch}-seed{self.seed}"

    @property
    def key(self) -> tuple[str, str, str, str]:
        """As a record's."""
        return self.task.name, self.implementation.name, CHECK, self.case

    def item(self, step: int) -> str:
        """A part of it in the progress."""
        return f"{self.task.name} {self.implementation.name} seed {self.seed}, step {step}"


def learn(
    task: Annotated[list[str] | None, typer.Option(help=f"{', '.join(TASKS)}; all by default")] = None,
    impl: Annotated[list[str] | None, typer.Option(help="implementation; native on a GPU, else torch")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="trainings of each, from seed 0 on")] = 1,
    steps: Annotated[int, typer.Option(min=0, help="of each training; fewer than a task's own have no bar")] = 0,
    short: Annotated[bool, typer.Option("--short", help="the short version of each task, with a lower bar")] = False,
    device: str = "",
    save_weights: Annotated[
        bool, typer.Option("--save-weights", help="keep what motion learns from seed 0 for parity's cases `trained`")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="folder of the run")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="continue the newest unfinished run, or that in --out")] = False,
) -> None:
    """Train small models on small tasks; exits 0 if all learnt what they must, 1 if one did not, 3 if nothing ran."""
    device = existing(device or default_device())
    names = tuple(task or TASKS)
    wanted = tuple(impl or ("fused:native" if device.startswith("cuda") else "fused:torch",))
    every = courses(names, wanted, seeds, steps, short)
    if save_weights and (short or steps or "motion" not in names or len({c.implementation.name for c in every}) > 1):
        raise UsageError("--save-weights needs task motion, one implementation, and neither --short nor --steps")
    environment.prepare()
    box = environment.describe(device)
    plan = {"tasks": names, "names": wanted, "seeds": seeds, "steps": steps, "short": short, "device": device}
    about = {"kind": CHECK, "plan": plan, "box": box}
    if resume:
        run = Run.open(out) if out else Run.latest(unfinished=True, kind=CHECK)
        resumable(run, about)
    else:
        run = Run.create(out, about | {"command": again(sys.argv[1:])})
    print(f"{len(every)} trainings on {box['gpu'] or box['cpu']}, into {run.folder}", flush=True)
    left = [c for c in every if c.key not in {r.key for r in run.records}]
    costs = {c.item(mark): float(c.recipe.steps * c.recipe.batch) for c in left for mark in looked_at(c.recipe.steps)}
    progress = Progress(costs)

    def work() -> None:
        for course in left:
            record, fitted = trained_by(course, device, progress)
            run.add(record)
            progress.say(page.said(record))
            if save_weights and fitted and course.task.name == "motion" and course.seed == 0 and not record.failed:
                progress.say(f"weights: {trained.save(fitted.model)}")

    done = conclude(run, progress, work, page.write)
    print(run.last_line())
    if not done:
        raise typer.Exit(INTERRUPTED)
    raise typer.Exit(exit_code(run))


def courses(names: tuple[str, ...], wanted: tuple[str, ...], seeds: int, steps: int, short: bool) -> list[Course]:
    """What is asked for, task by task. Raises UsageError for names that are unknown."""
    for name in names:
        if name not in TASKS:
            raise UsageError(f"task {name!r} is unknown; allowed are {', '.join(TASKS)}")
    models = videomamba.implementations()
    for pattern in wanted:
        if not any(fnmatchcase(i.name, pattern) for i in models):
            raise UsageError(f"implementation {pattern!r} is unknown; there are {', '.join(i.name for i in models)}")
    chosen = [i for i in models if any(fnmatchcase(i.name, pattern) for pattern in wanted)]
    return [
        Course(TASKS[name], recipe(TASKS[name], steps, short), implementation, seed)
        for name in dict.fromkeys(names)
        for implementation in chosen
        for seed in range(seeds)
    ]


def recipe(task: Task, steps: int, short: bool) -> Recipe:
    """The task's own, or with another number of steps; fewer steps than its own are not held to its bar."""
    own = task.short if short else task.full
    if not steps:
        return own
    return replace(own, steps=steps, bar=own.bar if steps >= own.steps else None)


def trained_by(course: Course, device: str, progress: Progress) -> tuple[Record, Fitted | None]:
    """The record of a training, and the model if there is one; whatever goes wrong becomes a record."""
    begin, fitted, findings = time.perf_counter(), None, []
    status, reason = "skip", course.implementation.absent(device) or ""
    if not reason:

        def tell(look: Look) -> None:
            item = course.item(look.step)
            progress.done(item, f"{item}: loss {look.loss:.3f}, held out {look.wrong} of {asked} wrong")

        try:
            data = course.task.data()
            asked = len(data.held_out[1])
            fitted = fit(course.task, data, course.implementation.call, course.recipe, course.seed, device, tell)
            findings = found(fitted, course.recipe)
            status = judged(findings)
        except torch.OutOfMemoryError as error:
            status, reason = "oom", str(error).splitlines()[0]
        except Exception as error:  # a kernel may raise anything; the run goes on and the record says what
            status, reason = "error", f"{type(error).__name__}: {str(error)[:600]}"
    short = " --short" if course.recipe == course.task.short else ""
    steps = f" --steps {course.recipe.steps}" if course.recipe not in (course.task.full, course.task.short) else ""
    name = course.implementation.name
    record = Record(
        course.task.name, name, course.implementation.role, CHECK, course.case, "float32", status,
        round(time.perf_counter() - begin, 4), reason, tuple(findings),
        f"python -m harness learn --task {course.task.name} --impl {name} --seeds {course.seed + 1}{steps}{short} "
        f"--device {device}",
    )  # fmt: skip
    return record, fitted


def found(fitted: Fitted, recipe: Recipe) -> list[Finding]:
    """What is held out against the bar, losses that are no numbers, and the way there, which is measured only."""
    asked, last = fitted.asked, fitted.looks[-1]
    bar = f"bar {100 * recipe.bar:.0f} %" if recipe.bar is not None else "no bar"
    findings = [
        Finding("held out", "wrong", last.wrong, allowed(recipe.bar, asked), asked, note=bar),
        Finding("loss", "not finite", sum(x != x or abs(x) == float("inf") for x in fitted.losses), 0.0, len(fitted.losses)),
    ]
    for look in fitted.looks:
        for what, value in (("loss", look.loss), ("wrong", look.wrong), ("seconds", look.seconds)):
            findings.append(Finding(f"step {look.step}", what, value, float("inf"), asked))
    return findings
