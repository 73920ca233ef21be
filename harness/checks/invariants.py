"""Do the symmetries of the equation hold, by the implementation alone?

No reference is asked. What is due comes from a call of the implementation, and so does the measure of rounding: the change by
inputs that are off by one unit in the last place. What came, from another call, may differ by twice that and one rounding,
which is the rule with these in the places of truth and plain. `instruments.symmetries` has the relations.
"""

import torch
from torch import Tensor

from harness.judge.case import Case
from harness.judge.implementation import Implementation
from harness.judge.protocols import HasInvariants, Named, Subject
from harness.judge.trial import Trial
from harness.records.finding import Finding, Tally


def asks(subject: Subject, implementation: Implementation, case: Case) -> bool:
    """Return True of all implementations, the reference among them, in cases for it."""
    return case.only_check == "invariants" and isinstance(subject, HasInvariants)


def run(trial: Trial, implementation: Implementation) -> list[Finding]:
    """Apply the rule to every relation, pooled over seeds."""
    tally, subject = Tally(), trial.subject

    def outputs(case: Case, leaves: Named, cuts: tuple[int, ...] | None = None) -> Named:
        with torch.no_grad():
            if cuts is None:
                found = subject.evaluate(implementation.call, case, leaves)
            else:
                found = subject.chunked(implementation.call, case, leaves, cuts)
        return {k: v.cpu() for k, v in found.items()}

    for seed in trial.seeds:
        leaves = trial.leaves(seed)
        here = outputs(trial.case, leaves)
        near = outputs(trial.case, {k: nearest_other(trial.case, seed, k, v) for k, v in leaves.items()})
        for name, relation in subject.invariants(trial.case).items():
            due, came = relation(outputs, trial.case, leaves)
            for tensor, exact in due.items():
                exact = exact.cpu()
                rounded = exact.double() + near[tensor].double() - here[tensor].double()
                tally.add(f"{tensor}[{name}]", came.get(tensor), rounded.to(exact.dtype), exact)
    return tally.findings()


def nearest_other(case: Case, seed: int, name: str, x: Tensor) -> Tensor:
    """Return x with every number changed by one unit in the last place, up or down."""
    signs = case.normal(seed, "last place of " + name, *x.shape).sign().to(x.device, x.dtype)
    return x * (1 + torch.finfo(x.dtype).eps * signs)
