"""Is the same computed on a device that is not the current one, and left there?

By the rule, on the other device; outputs and gradients must lie there, and the current device must stay the current one.
The first device is asked before and after, bit by bit: what is loaded or kept for one must not serve the other.
"""

from types import ModuleType

import torch

from harness.judge.case import Case
from harness.judge.registry import CannotAsk, Implementation
from harness.judge.trial import Trial
from harness.records.finding import Finding, differing

SHAPES = {"scan": {"B": 3, "L": 7}, "conv": {"B": 3, "L": 7}, "norm": {"B": 2, "L": 9}, "mixer": {"B": 2, "L": 9}}
OPTIONS = (("reverse", "state"), ("kind=layer", "low"), ())


def asks(subject: ModuleType, implementation: Implementation, case: Case) -> bool:
    """Of operators and the mixer, at one small size."""
    here = case.subject in SHAPES and dict(case.dims).items() >= SHAPES[case.subject].items() and case.options in OPTIONS
    return implementation.name != "reference" and here and case.dtype == "float32"


def run(trial: Trial, implementation: Implementation) -> list[Finding]:
    """Here, there, and here again."""
    there = Trial(trial.case, another(trial.device))
    before = trial.got(implementation, 0, True).named()
    current = index()
    result = there.run_there(implementation, 0, True, there.leaves(0))
    found = [Finding("current device", "place", float(index() != current), 0.0)]
    for name, tensor in result.named().items():
        if tensor is not None:
            astray = place(tensor) != there.device
            found.append(Finding(name, "place", float(astray), 0.0, note=f"on {place(tensor)}, due on {there.device}"))
    if not all(f.passed for f in found):  # what lies elsewhere cannot be judged there
        return found
    after = trial.got(implementation, 0, True).named()
    return found + [differing(k, t, after[k]) for k, t in before.items()] + there.judge(implementation, grad=True)


def another(device: str) -> str:
    """A device of the same kind that is not the current one; raises CannotAsk where there is none."""
    if not device.startswith("cuda"):
        raise CannotAsk(f"there is only one {device}")
    if (count := torch.cuda.device_count()) < 2:
        raise CannotAsk(f"needs two GPUs, there is {count}")
    return f"cuda:{(index() + 1) % count}"


def index() -> int:
    """The current device."""
    return torch.cuda.current_device() if torch.cuda.is_available() else 0


def place(tensor: torch.Tensor) -> str:
    """Where a tensor lies."""
    return str(tensor.device)
