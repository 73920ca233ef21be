"""Do values at the edge of what numbers can be, and sequences at the edge of what memory can hold, keep to the rule?

- `delta=huge`, `tiny`, `negative` (all before the softplus), `A=zero`, `A=huge`, `z=huge`, `denormal`: every other channel of
  a scan is such (`fixtures.extreme_scan`), and even and odd channels are judged apart, so that large values do not hide small
  ones. Where values are denormal (`negative`, `denormal`), hardware may take them for 0, and the whole tensor is judged.
- `nan`: one NaN in an input makes NaN of exactly those outputs of which it makes NaN in the reference, and of at least those
  gradients: never a plausible number.
- `length`: the error of a scan grows with its length as it does in the reference. The clips of a batch are the seeds, truth
  and plain are computed on the CPU, which takes a long loop of small steps faster. Gradients of parameters, which sum over
  the clips, are asked by `backward`.
"""

import math

from torch import Tensor

from harness.judge.case import Case
from harness.judge.implementation import Implementation
from harness.judge.protocols import Subject
from harness.judge.trial import Named, Trial, worst_of
from harness.records.finding import Finding, Tally

JUDGED_WHOLE = ("delta=negative", "denormal")


def asks(subject: Subject, implementation: Implementation, case: Case) -> bool:
    """Return True of everything but the reference, in cases for it."""
    return implementation.name != "reference" and case.only_check == "extremes"


def run(trial: Trial, implementation: Implementation) -> list[Finding]:
    """Ask the question that the case's option names."""
    if trial.case.has("nan"):
        return with_one_nan(trial, implementation)
    if trial.case.has("length"):
        return by_clip(trial, implementation)
    if trial.case.has(*JUDGED_WHOLE):
        return trial.judge(implementation, grad=True)
    tally, axes = Tally(), trial.subject.channel_axes()
    for seed in trial.seeds:
        plain, truth = trial.plain(seed, True).named(), trial.truth(seed, True).named()
        got = trial.got(implementation, seed, True).named()
        for name, exact in truth.items():
            axis = axes.get(name.removeprefix("grad "))
            for first, part in enumerate(("", "") if axis is None else ("[even]", "[odd]")):
                tally.add(name + part, *(every_other(t, axis, first) for t in (got.get(name), plain[name], exact)))
    return worst_of(tally.findings())


def every_other(tensor: Tensor | None, axis: int | None, first: int) -> Tensor | None:
    """Return every other channel, from the first or the second one on; a tensor without channels as it is."""
    if tensor is None or axis is None:
        return tensor
    return tensor.movedim(axis, 0)[first::2]


def by_clip(trial: Trial, implementation: Implementation) -> list[Finding]:
    """Apply the rule, pooled over the clips of one batch."""
    tally, grad, per_clip = Tally(), trial.asks_gradients, trial.subject.per_clip(trial.case)
    plain, truth = trial.on_cpu.plain(0, grad).named(), trial.on_cpu.truth(0, grad).named()
    got = trial.got(implementation, 0, grad).named()
    for name, exact in truth.items():
        if name.startswith("grad ") and name.removeprefix("grad ") not in per_clip:
            continue
        for clip in range(trial.case["B"]):
            tally.add(name, *(None if t is None else t[clip] for t in (got.get(name), plain[name], exact)))
    return tally.findings()


def with_one_nan(trial: Trial, implementation: Implementation) -> list[Finding]:
    """Return where one NaN at a time, in the first clip or channel and the middle token, must come out and does not."""
    found = []
    for name in trial.leaves(0):
        plain, got = (
            trial.run(runner, 0, True, with_nan(trial.leaves(0), name)).named() for runner in (trial.reference, implementation)
        )
        for result, expected in plain.items():
            actual = got.get(result)
            if expected is None or actual is None:
                missing, stray = float(expected is not None and bool(expected.isnan().any())), 0.0
            else:
                missing = float((expected.isnan() & ~actual.isnan()).sum())
                stray = float((actual.isnan() & ~expected.isnan()).sum())
            label = f"{result}[NaN in {name}]"
            found.append(Finding(label, "nan", missing, 0.0, note="elements that are numbers, not NaN"))
            if result in trial.plain(0, True).outputs:
                found.append(Finding(label, "stray", stray, 0.0, note="elements that are NaN, not numbers"))
    return found


def with_nan(leaves: Named, name: str) -> Named:
    """Return the leaves with one NaN: at the middle token, and at index 0 of all other axes."""
    place = [0] * leaves[name].dim()
    if leaves[name].dim() == 3:
        place[1] = leaves[name].shape[1] // 2
    leaves[name][tuple(place)] = math.nan
    return leaves
