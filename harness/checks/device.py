"""Is the same computed on a device that is not the current one, and left there?

By the rule, on the other device; outputs and gradients must lie there, and the current device must stay the current one.
The first device is asked before and after, bit by bit: what is loaded or kept for one must not serve the other.
"""


import torch

from harness.judge.case import Case
from harness.judge.check import CannotAsk
from harness.judge.implementation import Implementation
from harness.judge.protocols import HasCostlyChecks, Subject
from harness.judge.trial import Trial
from harness.records.finding import Finding, differing


def asks(subject: Subject, implementation: Implementation, case: Case) -> bool:
    """Return True at the few small points that the subject selects."""
    selected = isinstance(subject, HasCostlyChecks) and "device" in subject.costly_checks(case)
    return implementation.name != "reference" and selected and case.dtype == "float32"


def run(trial: Trial, implementation: Implementation) -> list[Finding]:
    """Compute on the first device, on the other, and on the first again."""
    other = Trial(trial.case, other_device(trial.device))
    before = trial.got(implementation, 0, True).named()
    current = current_index()
    result = other.run_on_device(implementation, 0, True, other.leaves(0))
    found = [Finding("current device", "place", float(current_index() != current), 0.0)]
    for name, tensor in result.named().items():
        if tensor is not None:
            misplaced = device_of(tensor) != other.device
            found.append(Finding(name, "place", float(misplaced), 0.0, note=f"on {device_of(tensor)}, due on {other.device}"))
    if not all(f.passed for f in found):  # tensors on another device cannot be judged there
        return found
    after = trial.got(implementation, 0, True).named()
    return found + [differing(k, t, after[k]) for k, t in before.items()] + other.judge(implementation, grad=True)


def other_device(device: str) -> str:
    """Return a device of the same kind that is not the current one. Raises CannotAsk where there is none."""
    if not device.startswith("cuda"):
        raise CannotAsk(f"there is only one {device}")
    if (count := torch.cuda.device_count()) < 2:
        raise CannotAsk(f"needs two GPUs, there is {count}")
    return f"cuda:{(current_index() + 1) % count}"


def current_index() -> int:
    """Return the index of the current device."""
    return torch.cuda.current_device() if torch.cuda.is_available() else 0


def device_of(tensor: torch.Tensor) -> str:
    """Return the device on which a tensor lies."""
    return str(tensor.device)
