"""Do the gradients of every input, parameter and state agree with the reference in float64?"""


from harness.judge.case import Case
from harness.judge.implementation import Implementation
from harness.judge.protocols import Subject
from harness.judge.trial import Trial
from harness.records.finding import Finding


def asks(subject: Subject, implementation: Implementation, case: Case) -> bool:
    """Return True of everything but the reference, in cases that are about training."""
    return implementation.name != "reference" and case.dtype != "float64" and not case.has("infer")


def run(trial: Trial, implementation: Implementation) -> list[Finding]:
    """Judge outputs as computed in training, and the gradient of every leaf."""
    return trial.judge(implementation, grad=True)
