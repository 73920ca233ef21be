"""Do the outputs agree with the reference in float64?"""


from harness.judge.case import Case
from harness.judge.implementation import Implementation
from harness.judge.protocols import Subject
from harness.judge.trial import Trial
from harness.records.finding import Finding


def asks(subject: Subject, implementation: Implementation, case: Case) -> bool:
    """Return True of everything but the reference, whose plain result is the measure."""
    return implementation.name != "reference" and case.dtype != "float64"


def run(trial: Trial, implementation: Implementation) -> list[Finding]:
    """Judge outputs and final states without gradients being recorded, as in inference."""
    return trial.judge(implementation, grad=False)
