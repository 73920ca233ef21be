"""Do the outputs agree with the reference in float64?"""

from types import ModuleType

from harness.case import Case
from harness.finding import Finding
from harness.subject import Implementation
from harness.trial import Trial


def asks(subject: ModuleType, implementation: Implementation, case: Case) -> bool:
    """Of everything but the reference, whose plain result is the measure."""
    return implementation.name != "reference" and case.dtype != "float64"


def run(trial: Trial, implementation: Implementation) -> list[Finding]:
    """Outputs and final states without gradients being recorded, as in inference."""
    return trial.judge(implementation, grad=False)
