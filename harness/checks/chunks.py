"""Does a sequence cut anywhere and chained by its state equal the whole, in outputs, states and gradients?"""


import torch
from torch import Tensor

from harness.judge.case import Case
from harness.judge.implementation import Implementation
from harness.judge.protocols import Chunkable, Subject
from harness.judge.trial import MAX_REFERENCE_TOKENS, Trial, worst_of
from harness.records.finding import Finding, Tally

RANDOM_CUTS = (3, 6)  # of the random partitions, where there are so many places
FEW_UNITS = 16  # of which each is also a chunk by itself


def asks(subject: Subject, implementation: Implementation, case: Case) -> bool:
    """Return True of everything with a state, in cases that carry one in; of the reference where its loop is not too slow."""
    if implementation.name == "reference" and case["L"] > MAX_REFERENCE_TOKENS:
        return False
    return isinstance(subject, Chunkable) and case.has("state") and case.dtype != "float64" and subject.num_units(case) > 1


def run(trial: Trial, implementation: Implementation) -> list[Finding]:
    """Judge each chunk by itself against the truth of the whole sequence: no fault of a short chunk hides in a long one."""
    axes, count, grad = trial.subject.time_axes(trial.case), trial.subject.num_units(trial.case), trial.asks_gradients
    found = []
    for cuts in partitions(trial.case, count):
        tally = Tally()
        edges = list(zip(cuts, (*cuts[1:], count), strict=True))
        for seed in trial.seeds:
            plain, truth = trial.plain(seed, grad).named(), trial.truth(seed, grad).named()
            got = trial.run(implementation, seed, grad, trial.leaves(seed), cuts).named()
            for name, exact in truth.items():
                axis = axes.get(name.removeprefix("grad "))
                if axis is None or exact is None:
                    tally.add(name, got.get(name), plain[name], exact)
                    continue
                for start, stop in edges:
                    part = f"{name}[{start}:{stop}]"
                    tally.add(part, *(cut(t, axis, start, stop, count) for t in (got.get(name), plain[name], exact)))
        found += tally.findings()
    return worst_of(found)


def cut(tensor: Tensor | None, axis: int, start: int, stop: int, count: int) -> Tensor | None:
    """Return the part of a tensor that belongs to one chunk, of `count` equal units; the first has what is left over: CLS."""
    if tensor is None:
        return None
    size, extra = divmod(tensor.shape[axis], count)
    first = start * size + extra * (start > 0)
    return tensor.narrow(axis, first, stop * size + extra - first)


def partitions(case: Case, count: int) -> list[tuple[int, ...]]:
    """Return starts of chunks: one unit at each end; a few random cuts; and more of them, or of few units each by itself."""
    chosen: list[tuple[int, ...]] = [(0, 1, count - 1)]
    for cuts in RANDOM_CUTS if count > FEW_UNITS else RANDOM_CUTS[:1]:
        picks = torch.randperm(count - 1, generator=case.generator(0, f"{cuts} cuts"))[:cuts] + 1
        chosen.append((0, *picks.tolist()))
    if count <= FEW_UNITS:
        chosen.append(tuple(range(count)))
    return list(dict.fromkeys(tuple(sorted(set(cuts))) for cuts in chosen))
