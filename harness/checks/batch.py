"""Are a clip's results bitwise the same whatever its batch size, its position and its neighbours?

Outputs, states and the gradients of what has an entry per clip. Gradients of parameters sum over the batch and are left out,
as are mixer and models, whose matrix products are cuBLAS's. Runs in the implementation's `batch_invariant` mode.
"""

import math

import torch
from torch import Tensor

from harness.judge.case import Case
from harness.judge.implementation import Implementation
from harness.judge.protocols import BatchIndependent, Subject
from harness.judge.trial import Named, Trial, worst_of
from harness.records.finding import Finding, differing

# Batch size, place of the clip, and the factor of its neighbours. A neighbour of NaN is still only a neighbour.
BATCHES = ((2, 1, 1.0), (3, 1, math.nan), (5, 0, 1.0), (8, 6, 1.0), (33, 32, 1.0))
MAX_VALUES = 2**25  # token values in a batch: a larger one would ask nothing else of long clips


def asks(subject: Subject, implementation: Implementation, case: Case) -> bool:
    """Return True of operators that promise it; the reference is not one."""
    return isinstance(subject, BatchIndependent) and implementation.name != "reference" and case.dtype != "float64"


def run(trial: Trial, implementation: Implementation) -> list[Finding]:
    """Compare the first clip by itself with the same clip in batches."""
    ours, others = trial.leaves(0), trial.leaves(1)
    alone = in_batch(trial, implementation, ours, others, 1, 0, 1.0)
    largest = max(t[:1].numel() for t in ours.values())
    found = []
    for size, place, factor in BATCHES:
        if size > 2 and size * largest > MAX_VALUES:
            continue
        got = in_batch(trial, implementation, ours, others, size, place, factor)
        label = f"[{place} of {size}{', beside NaN' * math.isnan(factor)}]"
        found += [differing(name + label, tensor, got[name]) for name, tensor in alone.items()]
    return worst_of(found)


def in_batch(
    trial: Trial, implementation: Implementation, ours: Named, others: Named, size: int, place: int, factor: float
) -> dict[str, Tensor | None]:
    """Return the results of the first clip of `ours` at a place of a batch that is filled up with clips of `others`."""

    def placed(clips: Tensor, others: Tensor) -> Tensor:
        neighbours = [others[i % len(others)][None] * factor for i in range(size - 1)]
        return torch.cat([*neighbours[:place], clips[:1], *neighbours[place:]])

    def cotangent(name: str, output: Tensor) -> Tensor:
        return placed(*(trial.cotangent(seed, name, output[:1]) for seed in (0, 1)))

    per_clip = trial.subject.per_clip(trial.case)
    leaves = {k: placed(v, others[k]) if k in per_clip else v.clone() for k, v in ours.items()}
    with implementation.batch_invariant():
        result = trial.run(implementation, 0, trial.asks_gradients, leaves, cotangent=cotangent)
    kept = result.outputs | {f"grad {k}": g for k, g in result.gradients.items() if k in per_clip}
    return {k: None if t is None else t[place] for k, t in kept.items()}
