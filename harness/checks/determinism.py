"""Are outputs and gradients bitwise the same when computed again, and in another process?"""


from harness.judge.case import Case
from harness.judge.implementation import Implementation
from harness.judge.protocols import Subject
from harness.judge.trial import MAX_REFERENCE_TOKENS, Trial, digest
from harness.records.finding import Finding, differing


def asks(subject: Subject, implementation: Implementation, case: Case) -> bool:
    """Return True of every implementation; of the reference where its loop is not too slow."""
    if implementation.name == "reference" and case["L"] > MAX_REFERENCE_TOKENS:
        return False
    return case.dtype != "float64"


def run(trial: Trial, implementation: Implementation) -> list[Finding]:
    """Compare two runs here, element by element; one in a process of its own, by digest."""
    grad = trial.asks_gradients
    first, second = (trial.got(implementation, 0, grad).named() for _ in range(2))
    found = [differing(name, tensor, second[name]) for name, tensor in first.items()]
    digests = trial.digests_of_second_process(implementation.name)
    for name, tensor in first.items():
        differs = digests.get(name) != digest(tensor)
        found.append(Finding(name, "bitwise", float(differs), 0.0, note="against another process"))
    return found
