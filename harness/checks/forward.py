"""Do the outputs agree with the reference in float64?"""

from types import ModuleType

from harness.judge.case import Case
from harness.judge.registry import Implementation
from harness.judge.trial import Trial
from harness.records.finding import Finding


def asks(subject: ModuleType, implementation: Implementation, case: Case) -> bool:
    """Of everything but the reference, whose plain result is the measure."""
    return implementation.name != "reference" and case.dtype != "float64"


def run(trial: Trial, implementation: Implementation) -> list[Finding]:
    """Outputs and final states without gradients being recorded, as in inference."""
    return trial.judge(implementation, grad=False)
