"""Does a sequence cut anywhere and chained by its state equal the whole, in outputs, states and gradients?"""

from types import ModuleType

import torch
from torch import Tensor

from harness.judge.case import Case
from harness.judge.registry import Implementation
from harness.judge.trial import DEAR, Trial, worst_of
from harness.records.finding import Finding, Tally

RANDOM = (3, 6)  # how many cuts the random partitions have, where there are so many places
FEW = 16  # pieces that are also asked one by one


def asks(subject: ModuleType, implementation: Implementation, case: Case) -> bool:
    """Of everything with a state, in cases that carry one in; of the reference where its loop is not too dear."""
    if implementation.name == "reference" and case["L"] > DEAR:
        return False
    return hasattr(subject, "chunked") and case.has("state") and case.dtype != "float64" and pieces(subject, case) > 1


def run(trial: Trial, implementation: Implementation) -> list[Finding]:
    """Each chunk by itself against the truth of the whole, so that a fault in a short chunk cannot hide in a long one."""
    axes, count, grad = trial.subject.time_axes(trial.case), pieces(trial.subject, trial.case), trial.asks_gradients
    found = []
    for cuts in partitions(trial.case, count):
        tally = Tally()
        edges = list(zip(cuts, (*cuts[1:], count), strict=True))
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
                    tally.add(part, *(cut(t, axis, start, stop, count) for t in (got.get(name), plain[name], exact)))
        found += tally.findings()
    return worst_of(found)


def pieces(subject: ModuleType, case: Case) -> int:
    """Of how many pieces the sequence is: tubelets of a model's video, else tokens."""
    return subject.pieces(case) if hasattr(subject, "pieces") else case["L"]


def cut(tensor: Tensor | None, axis: int, start: int, stop: int, count: int) -> Tensor | None:
    """The part of a tensor that belongs to one chunk, of `count` equal pieces; the first has what is left over: CLS."""
    if tensor is None:
        return None
    size, extra = divmod(tensor.shape[axis], count)
    first = start * size + extra * (start > 0)
    return tensor.narrow(axis, first, stop * size + extra - first)


def partitions(case: Case, count: int) -> list[tuple[int, ...]]:
    """Starts of chunks: one piece at each end; a few random cuts; and more of them, or where pieces are few each by itself."""
    chosen: list[tuple[int, ...]] = [(0, 1, count - 1)]
    for cuts in RANDOM if count > FEW else RANDOM[:1]:
        picks = torch.randperm(count - 1, generator=case.generator(0, f"{cuts} cuts"))[:cuts] + 1
        chosen.append((0, *picks.tolist()))
    if count <= FEW:
        chosen.append(tuple(range(count)))
    return list(dict.fromkeys(tuple(sorted(set(cuts))) for cuts in chosen))
