"""Are the reference's own gradients those of its outputs, by finite differences in float64?

For every leaf x and a random direction v: the slope <grad, v> against (f(x + h v) - f(x - h v)) / 2h, where f is the outputs
weighted by the cotangents. The difference quotient's own error is measured, by doubling h (it then has four times the
truncation), and what float64 loses in the subtraction is added: that is the budget.
"""


import torch
from torch import Tensor

from harness.judge.case import Case
from harness.judge.implementation import Implementation
from harness.judge.protocols import Subject
from harness.judge.trial import Trial
from harness.records.finding import Finding

MANY_LEAVES = 16  # with more than these, each is tested under one of the seeds only
STEP = 2.0**-14  # near the cube root of float64's roundoff, where truncation and cancellation balance


def asks(subject: Subject, implementation: Implementation, case: Case) -> bool:
    """Return True of the reference, in its float64 cases, which are small."""
    return implementation.name == "reference" and case.dtype == "float64"


def run(trial: Trial, implementation: Implementation) -> list[Finding]:
    """Ask one direction a leaf and seed, errors and budgets pooled over the seeds."""
    squares: dict[str, list[float]] = {}
    for seed in trial.seeds:
        leaves = trial.leaves(seed)
        result = trial.got(implementation, seed, grad=True)
        without = trial.subject.no_cotangent(trial.case)
        weights = {k: trial.cotangent(seed, k, v).to(trial.device) for k, v in result.outputs.items() if k not in without}

        def value(moved: dict[str, Tensor], weights: dict[str, Tensor] = weights) -> tuple[float, float]:
            with torch.no_grad():
                outputs = trial.subject.evaluate(implementation.call, trial.case, moved)
            terms = torch.cat([(outputs[k] * w).flatten() for k, w in weights.items()])
            return float(terms.sum()), float(terms.abs().sum())

        for place, (name, leaf) in enumerate(leaves.items()):
            if len(leaves) > MANY_LEAVES and place % len(trial.seeds) != seed:
                continue
            v = trial.case.normal(seed, "direction " + name, *leaf.shape).to(leaf)
            v /= v.norm()
            quotient, magnitude = {}, 0.0
            for h in (STEP, 2 * STEP):
                (up, size), (down, _) = (value(leaves | {name: leaf + sign * h * v}) for sign in (1, -1))
                quotient[h], magnitude = (up - down) / (2 * h), max(magnitude, size)
            gradient = result.gradients[name]
            slope = 0.0 if gradient is None else float((gradient.to(v) * v).sum())
            error = slope - quotient[STEP]
            budget = abs(quotient[2 * STEP] - quotient[STEP]) + 8 * torch.finfo(torch.float64).eps * magnitude / STEP
            sums = squares.setdefault(name, [0.0, 0.0, 0.0])
            for i, x in enumerate((error, budget, slope)):
                sums[i] += x * x
    return [Finding(f"grad {name}", "slope", e**0.5, b**0.5, s**0.5) for name, (e, b, s) in squares.items()]
