"""Are outputs and gradients bitwise the same when computed again, and in another process?"""

from types import ModuleType

from harness.judge.case import Case
from harness.judge.registry import Implementation
from harness.judge.trial import DEAR, Trial, digest
from harness.records.finding import Finding, differing


def asks(subject: ModuleType, implementation: Implementation, case: Case) -> bool:
    """Of every implementation; of the reference where its loop is not too dear."""
    if implementation.name == "reference" and case["L"] > DEAR:
        return False
    return case.dtype != "float64"


def run(trial: Trial, implementation: Implementation) -> list[Finding]:
    """Two runs here, element by element; one in a process of its own, by digest."""
    grad = trial.asks_gradients
    first, second = (trial.got(implementation, 0, grad).named() for _ in range(2))
    found = [differing(name, tensor, second[name]) for name, tensor in first.items()]
    there = trial.elsewhere(trial.case, implementation.name)
    for name, tensor in first.items():
        differs = there.get(name) != digest(tensor)
        found.append(Finding(name, "bitwise", float(differs), 0.0, note="against another process"))
    return found
