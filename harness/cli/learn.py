"""`python -m harness learn`."""

import sys
import time
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Annotated

import torch
import typer

from harness.cli.options import Device, Names, Out, Resume
from harness.judge.implementation import Implementation
from harness.judge.request import UsageError, default_device, require_device, require_known
from harness.learning import trained_weights as trained
from harness.learning.fit import Evaluation, Fitted, evaluation_steps, fit
from harness.learning.task import Recipe, Task, allowed
from harness.learning.tasks import TASKS
from harness.records.finding import Finding
from harness.records.record import Record, judged
from harness.report import learning as page
from harness.runs import environment
from harness.runs.conclude import INTERRUPTED, conclude, exit_code, nothing_ran
from harness.runs.progress import Progress
from harness.runs.store import begin, require_writable, unfinished
from harness.subjects import videomamba

CHECK = "learn"  # the check that the records name


@dataclass(frozen=True)
class Training:
    """One training that is asked for: `implementation` learns `task` by `recipe` from `seed`."""

    task: Task
    recipe: Recipe
    implementation: Implementation
    seed: int

    @property
    def case(self) -> str:
        """Return the name that all implementations share."""
        return f"steps{self.recipe.steps}-batch{self.recipe.batch}-seed{self.seed}"

    @property
    def key(self) -> tuple[str, str, str, str]:
        """Return the key of its record."""
        return self.task.name, self.implementation.name, CHECK, self.case

    def item(self, step: int) -> str:
        """Return the name of one of its parts in the progress, up to `step`."""
        return f"{self.task.name} {self.implementation.name} seed {self.seed}, step {step}"


def learn(
    task: Annotated[Names, typer.Option(help=f"{', '.join(TASKS)}; all by default")] = None,
    impl: Annotated[Names, typer.Option(help="shell patterns allowed; fused:native on a GPU, else fused:torch")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="trainings of each task, with seeds from 0 on")] = 1,
    steps: Annotated[int, typer.Option(min=0, help="steps of each training; 0 takes the task's own; fewer have no bar")] = 0,
    short: Annotated[bool, typer.Option("--short", help="the short version of each task, with a lower bar")] = False,
    device: Device = "",
    save_weights: Annotated[
        bool, typer.Option("--save-weights", help="keep what motion learns from seed 0 for parity's cases `trained`")
    ] = False,
    out: Out = None,
    resume: Resume = False,
) -> None:
    """Train small models on small tasks; exits 0 if all learnt what they must, 1 if one did not, 3 if nothing ran.

    Where no implementation that is asked for is here, no folder is made.
    """
    require_writable(out)
    device = require_device(device or default_device())
    names = tuple(task or TASKS)
    wanted = tuple(impl or ("fused:native" if device.startswith("cuda") else "fused:torch",))
    every = trainings(names, wanted, seeds, steps, short)
    if save_weights and (short or steps or "motion" not in names or len({c.implementation.name for c in every}) > 1):
        raise UsageError("--save-weights needs task motion, one implementation, and neither --short nor --steps")
    earlier = unfinished(out, CHECK) if resume else None
    absent = {c.implementation.name: c.implementation.absent(device) for c in every}
    if not earlier and all(absent.values()):
        raise typer.Exit(nothing_ran(f"{name}: {reason}" for name, reason in absent.items()))
    environment.prepare()
    box = environment.describe(device)
    plan = {"tasks": names, "names": wanted, "seeds": seeds, "steps": steps, "short": short, "device": device}
    about = {"kind": CHECK, "plan": plan, "box": box}
    run = begin(about, sys.argv[1:], out, earlier)
    print(f"{len(every)} trainings on {box['gpu'] or box['cpu']}, into {run.folder}", flush=True)
    left = [c for c in every if c.key not in {r.key for r in run.records}]
    costs = {c.item(mark): float(c.recipe.steps * c.recipe.batch) for c in left for mark in evaluation_steps(c.recipe.steps)}
    progress = Progress(costs)

    def work() -> None:
        for training in left:
            record, fitted = run_training(training, device, progress)
            run.add(record)
            progress.say(page.one_line(record))
            if save_weights and fitted and training.task.name == "motion" and training.seed == 0 and not record.failed:
                progress.say(f"weights: {trained.save(fitted.model)}")

    done = conclude(run, progress, work, page.write)
    print(run.last_line())
    if not done:
        raise typer.Exit(INTERRUPTED)
    raise typer.Exit(exit_code(run))


def trainings(names: tuple[str, ...], wanted: tuple[str, ...], seeds: int, steps: int, short: bool) -> list[Training]:
    """Return the trainings that are asked for, task by task. Raises UsageError for names that are unknown."""
    require_known("task", names, TASKS)
    models = videomamba.implementations()
    require_known("implementation", wanted, [i.name for i in models], patterns=True)
    chosen = [i for i in models if any(fnmatchcase(i.name, pattern) for pattern in wanted)]
    return [
        Training(TASKS[name], recipe(TASKS[name], steps, short), implementation, seed)
        for name in dict.fromkeys(names)
        for implementation in chosen
        for seed in range(seeds)
    ]


def recipe(task: Task, steps: int, short: bool) -> Recipe:
    """Return the task's recipe, or it with another number of steps; fewer steps than its default have no bar."""
    default = task.short if short else task.full
    if not steps:
        return default
    return replace(default, steps=steps, bar=default.bar if steps >= default.steps else None)


def run_training(training: Training, device: str, progress: Progress) -> tuple[Record, Fitted | None]:
    """Return the record of a training, and the model if there is one; whatever goes wrong becomes a record."""
    start, fitted, findings = time.perf_counter(), None, []
    status, reason = "skip", training.implementation.absent(device) or ""
    if training.task.fit is not None and training.implementation.backend is None:
        reason = f"the task {training.task.name} is for fused"
    if not reason:

        def tell(evaluation: Evaluation) -> None:
            item = training.item(evaluation.step)
            progress.done(item, f"{item}: loss {evaluation.loss:.3f}, held out {evaluation.wrong} of {num_held_out} wrong")

        try:
            data = training.task.data()
            num_held_out = len(data.held_out[1])
            train = training.task.fit or fit
            fitted = train(training.task, data, training.implementation.call, training.recipe, training.seed, device, tell)
            findings = findings_of(fitted, training.recipe)
            status = judged(findings)
        except torch.OutOfMemoryError as error:
            status, reason = "oom", str(error).splitlines()[0]
        except Exception as error:  # a kernel may raise anything; the run goes on and the record says what
            status, reason = "error", f"{type(error).__name__}: {str(error)[:600]}"
    short = " --short" if training.recipe == training.task.short else ""
    steps = f" --steps {training.recipe.steps}" if training.recipe not in (training.task.full, training.task.short) else ""
    name = training.implementation.name
    record = Record(
        training.task.name, name, training.implementation.role, CHECK, training.case, "float32", status,
        round(time.perf_counter() - start, 4), reason, tuple(findings),
        f"python -m harness learn --task {training.task.name} --impl {name} --seeds {training.seed + 1}{steps}{short} "
        f"--device {device}",
    )  # fmt: skip
    return record, fitted


def findings_of(fitted: Fitted, recipe: Recipe) -> list[Finding]:
    """Return the findings of a training.

    Judged are the wrong answers, against the bar, and losses that are no numbers; every look is measured only.
    """
    num_held_out, last = fitted.num_held_out, fitted.evaluations[-1]
    bar = f"bar {100 * recipe.bar:.0f} %" if recipe.bar is not None else "no bar"
    findings = [
        Finding("held out", "wrong", last.wrong, allowed(recipe.bar, num_held_out), num_held_out, note=bar),
        Finding("loss", "not finite", sum(x != x or abs(x) == float("inf") for x in fitted.losses), 0.0, len(fitted.losses)),
    ]
    for evaluation in fitted.evaluations:
        for norm, value in (("loss", evaluation.loss), ("wrong", evaluation.wrong), ("seconds", evaluation.seconds)):
            findings.append(Finding(f"step {evaluation.step}", norm, value, float("inf"), num_held_out))
    return findings
