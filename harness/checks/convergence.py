"""Does a training go where it goes in float64, step by step and left to itself?

- At every fifth step of a training in float64, an implementation is set to that training's parameters and momentum, rounded
  to float32, and takes one step from there, for each of the batches; under autocast also from states near by, all parameters
  changed by a hundredth. Its losses before and after the step and the gradients of all parameters keep to the rule, against
  float64 from the same rounded numbers.
- `free run`: trained by itself, it is after every step at most twice as far from the training in float64 as the farthest of
  four plain ones. Those begin one ulp of float32 away, and see clips that are one rounding of the case's dtype away: without
  the latter, all four round alike under autocast, and are identical. A distance is L2 over all parameters, over the truth's
  norm.

The module is trained as users do it: its own parameters, changed in place by PyTorch's SGD with momentum.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from harness.instruments.short_training import BATCHES, Learner, State, Task
from harness.judge.case import Case
from harness.judge.check import CannotAsk
from harness.judge.implementation import Implementation
from harness.judge.protocols import Subject, Trainable
from harness.judge.seeds import ROUNDINGS
from harness.judge.trial import Named, Trial, worst_of
from harness.records.finding import Finding, PlainNotFinite, Tally

EVERY = 5  # steps between single steps that are judged
POOLED = 4  # single steps over which errors are pooled, not over all: gradients shrink as a training goes on
RUNS = 4
LEARNT = 0.5  # the share of its first loss that the truth may keep; a run that does not learn shows nothing

NAME = "convergence"
LOSS, DISTANCE, FREE = "loss", "distance", "free run"
TRUTH, PLAIN, GOT = "truth", "plain", "got"  # the labels of curves


def steps(case: Case) -> float:
    """Return the cost of truth and plain, as tokens of the scan."""
    return (82.0 if case.has("autocast") else 36.0) * num_steps(case)


def num_steps(case: Case) -> int:
    """Return the steps of a training."""
    return int(case.option("steps", ""))


def asks(subject: Subject, implementation: Implementation, case: Case) -> bool:
    """Return True of everything but the reference, in cases for it."""
    return case.only_check == NAME and isinstance(subject, Trainable) and implementation.name != "reference"


@dataclass(frozen=True)
class FreeRun:
    """A free run: the loss of every step's batch and the distance from the truth, before every step and after the last."""

    losses: tuple[float, ...]
    distances: tuple[float, ...]


@dataclass(frozen=True)
class Trainings:
    """Truth and plain, which are the same for all implementations."""

    task: Task
    truth: list[tuple[float, State]]  # loss and state before every step and after the last
    plain: list[FreeRun]  # free runs, each from another ulp
    single: dict[int, list[tuple[Named, Named]]]  # results of truth and plain at every fifth step, by state and batch

    @property
    def kept(self) -> float:
        """Return the truth's loss at the end as a share of that at the start, each over one round through the clips."""
        losses = [loss for loss, _ in self.truth]
        return sum(losses[-BATCHES:]) / sum(losses[:BATCHES])


def run(trial: Trial, implementation: Implementation) -> list[Finding]:
    """Apply the rule at every fifth step, then judge the free run and return its curves."""
    trainings = trial.cached(NAME, lambda: train_reference(trial))
    if not trainings.kept <= LEARNT:
        raise CannotAsk(f"the truth does not learn from this video: {trainings.kept:.3g} of its loss is left")
    learner = Learner(trainings.task, implementation.call)
    return worst_of(judge_single_steps(trainings, learner)) + judge_free_run(trainings, learner)


def train_reference(trial: Trial) -> Trainings:
    """Return truth and plain."""
    task, case = Task(trial), trial.case
    exact, plain = (Learner(task, trial.reference.call, exact=exactly) for exactly in (True, False))
    truth = list(exact.run(task.start, num_steps(case)))
    runs = [
        free_run(truth, Learner(task, trial.reference.call, rounding=number), task.start.an_ulp_away(case, number))
        for number in range(RUNS)
    ]
    if not all(map(math.isfinite, (x for one in runs for x in (*one.losses, *one.distances)))):
        raise PlainNotFinite(f"the reference's training is not finite in {case.dtype}")
    single = {}
    for at in range(0, num_steps(case), EVERY):
        single[at] = list(zip(single_steps(exact, truth, at), single_steps(plain, truth, at), strict=True))
    return Trainings(task, truth, runs, single)


def single_steps(learner: Learner, truth: list[tuple[float, State]], at: int) -> Iterator[Named]:
    """Yield one step from the truth's state, and under autocast from others near by: there the errors of all tensors depend on
    one state, and are a lottery."""
    state, case = truth[at][1], learner.task.case
    for draw in range(ROUNDINGS if case.has("autocast") else 1):
        yield from one_step(learner, (state.jittered(case, f"{at} {draw}") if draw else state).rounded(), at)


def one_step(learner: Learner, state: State, at: int) -> Iterator[Named]:
    """Yield, from one state with each of the batches, the losses, the gradients, and the losses after the step."""
    for batch in range(at, at + BATCHES):
        learner.load(state)
        losses, gradients = learner.gradients(batch)
        found = {LOSS: losses} | {f"grad {k}": g.clone() for k, g in gradients.items() if g is not None}
        learner.update()
        with torch.no_grad():
            found[f"{LOSS} after the step"] = learner.task.losses(learner.model, batch)
        yield {k: t.cpu() for k, t in found.items()}


def judge_single_steps(trainings: Trainings, learner: Learner) -> list[Finding]:
    """Apply the rule to single steps, pooled over each part of the training."""
    starts, found = list(trainings.single), []
    parts = max(1, len(starts) // POOLED)
    for part in range(parts):
        pooled, tally = starts[part * len(starts) // parts : (part + 1) * len(starts) // parts], Tally()
        for at in pooled:
            expected = trainings.single[at]
            for (truth, plain), got in zip(expected, single_steps(learner, trainings.truth, at), strict=True):
                for name in truth | got:
                    tally.add(f"{name}[steps {pooled[0]} to {pooled[-1]}]", got.get(name), plain.get(name), truth.get(name))
        found += tally.findings()
    return found


def free_run(truth: list[tuple[float, State]], learner: Learner, start: State) -> FreeRun:
    """Return a free run, and how far it is from the truth."""
    losses, distances = [], []
    for (_, expected), (loss, state) in zip(truth, learner.run(start, len(truth) - 1), strict=True):
        exact = expected.flat()
        losses.append(loss)
        distances.append(float((state.flat() - exact).norm() / exact.norm()))
    return FreeRun(tuple(losses), tuple(distances))


def judge_free_run(trainings: Trainings, learner: Learner) -> list[Finding]:
    """Return the step at which the free run is nearest to its budget, or farthest beyond; and all curves."""
    got = free_run(trainings.truth, learner, trainings.task.start)
    allowed = [2 * max(distances) for distances in zip(*(one.distances for one in trainings.plain), strict=True)]
    spent = [d / most if math.isfinite(d) else math.inf for d, most in zip(got.distances, allowed, strict=True)]
    at = spent.index(max(spent))
    curves = {f"{LOSS}, {TRUTH}": [loss for loss, _ in trainings.truth], f"{LOSS}, {PLAIN}": trainings.plain[0].losses}
    curves |= {f"{LOSS}, {GOT}": got.losses} | {f"{PLAIN} run {i}": one.distances for i, one in enumerate(trainings.plain, 1)}
    return [
        Finding(FREE, DISTANCE, got.distances[at], allowed[at], 1.0, (at,), "after that many steps", digits(got.distances)),
        Finding("loss that the truth keeps", "share", trainings.kept, math.inf, 1.0),
        *(Finding(name, "curve", line[-1], math.inf, line[0], curve=digits(line)) for name, line in curves.items()),
    ]


def digits(line: Sequence[float]) -> tuple[float, ...]:
    """Return the curve with as many digits as a plot shows."""
    return tuple(float(f"{x:.4g}") for x in line)
