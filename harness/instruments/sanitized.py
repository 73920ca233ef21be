"""The program that NVIDIA's compute-sanitizer watches: every kernel of a subject once, at small sizes, and nothing beside them.

`python -m harness.instruments.sanitized SUBJECT` prints each case that it has run.
"""

import sys
from dataclasses import replace

import torch

from fused.ops.selective_scan.schedule import MOMENTS_FROM
from harness.judge.case import Case
from harness.judge.registry import subjects
from harness.judge.trial import Trial
from harness.runs import environment

DTYPES = ("float32", "bfloat16")
LONG = {"scan": {"L": 300, "E": 64}, "scan_both": {"L": 300, "E": 64}, "ssd": {"L": 300}}  # which blocks share out


def cases_of(subject: str) -> list[Case]:
    """Return the largest smoke case of every set of options, in float32 and bfloat16; then long ones. Of a mixer these are the
    cases of the full grid in which state passes sum by moments, walk token by token, and exit."""
    asked = [c for c in subjects()[subject].cases("smoke") if not c.only_check and not c.has("video") and c.dtype in DTYPES]
    asked.sort(key=lambda case: dict(case.dims).get("L", 1) * dict(case.dims).get("E", 1))
    largest = list({(c.options, c.dtype): c for c in asked}.values())
    if subject in LONG and largest:
        longer = tuple((dict(largest[0].dims) | LONG[subject]).items())
        largest += [replace(largest[0], dims=longer, options=(), dtype=dtype) for dtype in DTYPES]
    if subject == "mixer":
        largest += [case for case in subjects()[subject].cases("full") if case["L"] >= MOMENTS_FROM]
    return largest


def main(subject: str, device: str = "cuda", name: str = "fused:native") -> int:
    """Run the outputs, and the gradients where there are any, of one implementation in every case; return an exit code."""
    environment.prepare()
    [implementation] = [i for i in subjects()[subject].implementations() if i.name == name]
    if reason := implementation.absent(device):
        print(f"{name} cannot run here: {reason}")
        return 4
    for case in cases_of(subject):
        if implementation.missing(case):
            continue
        trial = Trial(case, device)
        trial.run(implementation, 0, trial.asks_gradients, trial.leaves(0))
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        print(case.name, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
