"""Does the state_dict have the reference's names, shapes and dtypes?"""


import torch

from harness.judge.case import Case
from harness.judge.implementation import Implementation
from harness.judge.protocols import HasModule, Subject
from harness.judge.trial import Trial
from harness.records.finding import Finding


def asks(subject: Subject, implementation: Implementation, case: Case) -> bool:
    """Return True of modules, once for each configuration."""
    return isinstance(subject, HasModule) and implementation.name != "reference" and case.dtype == "float32"


def run(trial: Trial, implementation: Implementation) -> list[Finding]:
    """Return one finding a key; 1 is a key that is missing, unknown, or of another shape or dtype."""
    with torch.device("meta"):
        due, got = (shapes_and_dtypes(trial.subject.build(i.call, trial.case)) for i in (trial.reference, implementation))
    keys = dict.fromkeys([*due, *got])
    return [
        Finding(key, "layout", float(due.get(key) != got.get(key)), 0.0, note=f"got {got.get(key)}, due {due.get(key)}")
        for key in keys
    ]


def shapes_and_dtypes(module: torch.nn.Module) -> dict[str, str]:
    """Return shape and dtype by key."""
    return {key: f"{tuple(t.shape)} {t.dtype}" for key, t in module.state_dict().items()}
