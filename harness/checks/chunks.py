"""Does a sequence cut anywhere and chained by its state equal the whole, in outputs, states and gradients?"""

from types import ModuleType

import torch
from torch import Tensor

from harness.case import Case
from harness.finding import Finding, Tally
from harness.subject import Implementation
from harness.trial import DEAR, Trial, worst_of


def asks(subject: ModuleType, implementation: Implementation, case: Case) -> bool:
    """Of everything with a state, in cases that carry one in; of the reference where its loop is not too dear."""
    if implementation.name == "reference" and case["L"] > DEAR:
        return False
    return hasattr(subject, "chunked") and case.has("state") and case.dtype != "float64" and case["L"] > 1


def run(trial: Trial, implementation: Implementation) -> list[Finding]:
    """Each chunk by itself against the truth of the whole, so that a fault in a short chunk cannot hide in a long one."""
    axes, length, grad = trial.subject.time_axes(trial.case), trial.case["L"], trial.asks_gradients
    found = []
    for cuts in partitions(length):
        tally = Tally()
        edges = list(zip(cuts, (*cuts[1:], length), strict=True))
        for seed in trial.case.seeds:
            plain, truth = trial.plain(seed, grad).named(), trial.truth(seed, grad).named()
            got = trial.run(implementation, seed, grad, trial.leaves(seed), cuts).named()
            for name, exact in truth.items():
                axis = axes.get(name.removeprefix("grad "))
                if axis is None or exact is None:
                    tally.add(name, got.get(name), plain[name], exact)
                    continue
                for start, stop in edges:
                    part = f"{name}[{start}:{stop}]"
                    tally.add(part, *(cut(t, axis, start, stop) for t in (got.get(name), plain[name], exact)))
        found += tally.findings()
    return worst_of(found)


def cut(tensor: Tensor | None, axis: int, start: int, stop: int) -> Tensor | None:
    """The part of a tensor that belongs to one chunk."""
    return None if tensor is None else tensor.narrow(axis, start, stop - start)


def partitions(length: int) -> list[tuple[int, ...]]:
    """Starts of chunks: one token at each end; a few random cuts; and, for short sequences, every token by itself."""
    ends = sorted({0, 1, length - 1})
    picks = torch.randperm(length - 1, generator=torch.Generator().manual_seed(length))[:3] + 1
    some = sorted({0, *picks.tolist()})
    every = [tuple(range(length))] if length <= 16 else []
    return list(dict.fromkeys([tuple(ends), tuple(some), *every]))
