"""Is every element of every result written, nothing beside them, and no input or cotangent changed?

Three runs must give the same bits: in fresh memory; and twice between guard bands, where memory that is asked for
uninitialised is filled with NaN, then with a large number. Before those, one run on inputs of NaN, so that whatever is left
over from call to call is NaN too.
"""

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from harness.instruments.guard_bands import GuardedMemory
from harness.judge.case import Case
from harness.judge.implementation import Implementation
from harness.judge.protocols import HasCostlyChecks, Subject
from harness.judge.trial import Trial
from harness.records.finding import Finding, differing

GARBAGE = (math.nan, 4096.0)


def asks(subject: Subject, implementation: Implementation, case: Case) -> bool:
    """Return True in low precision where the subject selects it: of operators and of the mixer, which allocate memory."""
    selected = isinstance(subject, HasCostlyChecks) and "writes" in subject.costly_checks(case)
    return implementation.name != "reference" and selected and case.dtype != "float64"


def run(trial: Trial, implementation: Implementation) -> list[Finding]:
    """Return elements that differ between the runs, and bytes that changed where none may."""
    grad = trial.asks_gradients
    fresh = trial.got(implementation, 0, grad).named()
    trial.run(implementation, 0, grad, {k: v * math.nan for k, v in trial.leaves(0).items()})
    found = []
    for garbage in GARBAGE:
        memory = GuardedMemory(garbage)
        leaves = {k: memory.place(k, v) for k, v in trial.leaves(0).items()}

        def cotangent(name: str, output: Tensor, memory: GuardedMemory = memory) -> Tensor:
            return memory.place(f"cotangent {name}", trial.cotangent(0, name, output))

        with filled_with_nan(math.isnan(garbage)), memory.allocating():
            got = trial.run(implementation, 0, grad, leaves, cotangent=cotangent).named()
        found += [differing(name, tensor, got[name]) for name, tensor in fresh.items()]
        found += memory.findings()
    return found


@contextlib.contextmanager
def filled_with_nan(on: bool) -> Iterator[None]:
    """Set whether PyTorch itself fills memory that it allocates, also where no Python function is called."""
    deterministic: Any = torch.utils.deterministic
    before, deterministic.fill_uninitialized_memory = deterministic.fill_uninitialized_memory, on
    try:
        yield
    finally:
        deterministic.fill_uninitialized_memory = before
