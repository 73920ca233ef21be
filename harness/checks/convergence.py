"""Does a training go where it goes in float64, step by step and left to itself?

- At every fifth step of a training in float64, an implementation is set to that training's parameters and momentum, rounded
  to float32, and takes one step from there, for each of the batches; under autocast also from states near by, all parameters
  changed by a hundredth. Its losses before and after the step and the gradients of all parameters keep to the rule, against
  float64 from the same rounded numbers.
- `free run`: trained by itself, it is after every step at most twice as far from the training in float64 as the farthest of
  four plain ones. Those begin one ulp of float32 away, and see clips that are one rounding of the case's dtype away: without
  the latter, all four round alike under autocast, and are as one. A distance is L2 over all parameters, over the truth's norm.

The module is trained as users do it: its own parameters, changed in place by PyTorch's SGD with momentum.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType

import torch

from harness.fixtures import functional_modules as modules
from harness.instruments.short_training import BATCHES, Learner, State, Task, clips
from harness.judge.case import ROUNDINGS, Case
from harness.judge.registry import CannotAsk, Implementation, subjects
from harness.judge.trial import Named, Trial, worst_of
from harness.records.finding import Finding, PlainNotFinite, Tally

STEPS, EVERY = 60, 5
POOLED = 4  # places over whose steps errors are pooled, not over all: gradients shrink as a training goes on
RUNS = 4
LEARNT = 0.5  # the share of its first loss that the truth may keep; a check on a run that does not learn is none

NAME = "convergence"
LOSS, DISTANCE, FREE = "loss", "distance", "free run"
TRUTH, PLAIN, GOT = "truth", "plain", "got"  # of whom there are curves


def cases(grid: str) -> list[Case]:
    """Two models of two frames of 32 pixels; on the smoke grid each in one precision."""
    shape = {"B": 12, "T": 2, "S": 32, "D": 16, "L": 9}
    own = ("video", f"steps={STEPS}", f"for={NAME}")
    supervised = modules.precisions([(shape, own)], "videomamba", half=False)
    aligned = modules.precisions([(shape, ("mask", *own))], "encoder", half=False)
    return [supervised[0], aligned[1]] if grid == "smoke" else [*supervised, *aligned]


def steps(case: Case) -> float:
    """What truth and plain cost, as tokens of the scan."""
    return (82.0 if case.has("autocast") else 36.0) * count(case)


def count(case: Case) -> int:
    """Steps of a training."""
    return int(case.option("steps", ""))


def draw(case: Case, seed: int) -> Named:
    """All clips of the task, and the parameters with which every training begins."""
    subject = subjects()[case.subject]
    module = modules.on_meta(subject.build, subject.implementations()[0].call, case)
    return {"clip": clips(case)} | modules.parameters(module, case, seed)


def asks(subject: ModuleType, implementation: Implementation, case: Case) -> bool:
    """Of everything but the reference, in the cases above."""
    return case.asker == NAME and implementation.name != "reference"


@dataclass(frozen=True)
class Way:
    """A free run: the loss of every step's batch and the distance from the truth, before every step and after the last."""

    losses: tuple[float, ...]
    distances: tuple[float, ...]


@dataclass(frozen=True)
class Course:
    """What is the same for all that are asked."""

    task: Task
    truth: list[tuple[float, State]]  # loss and state before every step and after the last
    plain: list[Way]  # free runs, each from another ulp
    single: dict[int, list[tuple[Named, Named]]]  # what truth and plain give at every fifth step, by state and batch

    @property
    def kept(self) -> float:
        """The truth's loss at the end as a share of that at the start, each over one round through the clips."""
        losses = [loss for loss, _ in self.truth]
        return sum(losses[-BATCHES:]) / sum(losses[:BATCHES])


def run(trial: Trial, implementation: Implementation) -> list[Finding]:
    """The rule at every fifth step, then the free run and its curves."""
    course = trial.once(NAME, lambda: follow(trial))
    if not course.kept <= LEARNT:
        raise CannotAsk(f"the truth does not learn from this video: {course.kept:.3g} of its loss is left")
    learner = Learner(course.task, implementation.call)
    return worst_of(by_steps(course, learner)) + by_itself(course, learner)


def follow(trial: Trial) -> Course:
    """Truth and plain."""
    task, case = Task(trial), trial.case
    exact, plain = (Learner(task, trial.reference.call, exact=exactly) for exactly in (True, False))
    truth = list(exact.run(task.start, count(case)))
    ways = [
        beside(truth, Learner(task, trial.reference.call, blur=number), task.start.an_ulp_away(case, number))
        for number in range(RUNS)
    ]
    if not all(map(math.isfinite, (x for way in ways for x in (*way.losses, *way.distances)))):
        raise PlainNotFinite(f"the reference's training is not finite in {case.dtype}")
    single = {}
    for at in range(0, count(case), EVERY):
        single[at] = list(zip(single_steps(exact, truth, at), single_steps(plain, truth, at), strict=True))
    return Course(task, truth, ways, single)


def single_steps(learner: Learner, truth: list[tuple[float, State]], at: int) -> Iterator[Named]:
    """One step from the truth's state, and under autocast from others near by: there the errors of all tensors hang together
    at one state, and are a lottery."""
    state, case = truth[at][1], learner.task.case
    for draw in range(ROUNDINGS if case.has("autocast") else 1):
        yield from one_step(learner, (state.jittered(case, f"{at} {draw}") if draw else state).rounded(), at)


def one_step(learner: Learner, state: State, at: int) -> Iterator[Named]:
    """From one state with each of the batches: its losses, the gradients, and its losses after the step."""
    for batch in range(at, at + BATCHES):
        learner.load(state)
        losses, gradients = learner.gradients(batch)
        found = {LOSS: losses} | {f"grad {k}": g.clone() for k, g in gradients.items() if g is not None}
        learner.update()
        with torch.no_grad():
            found[f"{LOSS} after the step"] = learner.task.losses(learner.model, batch)
        yield {k: t.cpu() for k, t in found.items()}


def by_steps(course: Course, learner: Learner) -> list[Finding]:
    """The rule for single steps, pooled over each part of the training."""
    places, found = list(course.single), []
    parts = max(1, len(places) // POOLED)
    for part in range(parts):
        mine, tally = places[part * len(places) // parts : (part + 1) * len(places) // parts], Tally()
        for at in mine:
            due = course.single[at]
            for (truth, plain), got in zip(due, single_steps(learner, course.truth, at), strict=True):
                for name in truth | got:
                    tally.add(f"{name}[steps {mine[0]} to {mine[-1]}]", got.get(name), plain.get(name), truth.get(name))
        found += tally.findings()
    return found


def beside(truth: list[tuple[float, State]], learner: Learner, start: State) -> Way:
    """A free run, and how far it is from the truth."""
    losses, distances = [], []
    for (_, due), (loss, state) in zip(truth, learner.run(start, len(truth) - 1), strict=True):
        exact = due.flat()
        losses.append(loss)
        distances.append(float((state.flat() - exact).norm() / exact.norm()))
    return Way(tuple(losses), tuple(distances))


def by_itself(course: Course, learner: Learner) -> list[Finding]:
    """The step at which the free run is nearest to leaving what is allowed, or farthest beyond; and all curves."""
    got = beside(course.truth, learner, course.task.start)
    allowed = [2 * max(distances) for distances in zip(*(way.distances for way in course.plain), strict=True)]
    spent = [d / most if math.isfinite(d) else math.inf for d, most in zip(got.distances, allowed, strict=True)]
    at = spent.index(max(spent))
    curves = {f"{LOSS}, {TRUTH}": [loss for loss, _ in course.truth], f"{LOSS}, {PLAIN}": course.plain[0].losses}
    curves |= {f"{LOSS}, {GOT}": got.losses} | {f"{PLAIN} run {i}": way.distances for i, way in enumerate(course.plain, 1)}
    return [
        Finding(FREE, DISTANCE, got.distances[at], allowed[at], 1.0, (at,), "after that many steps", digits(got.distances)),
        Finding("loss that the truth keeps", "share", course.kept, math.inf, 1.0),
        *(Finding(name, "curve", line[-1], math.inf, line[0], curve=digits(line)) for name, line in curves.items()),
    ]


def digits(line: Sequence[float]) -> tuple[float, ...]:
    """As many as a plot shows."""
    return tuple(float(f"{x:.4g}") for x in line)
