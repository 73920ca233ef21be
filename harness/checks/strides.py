"""Do inputs and cotangents give the same wherever they lie in memory: any stride, any offset, more than 2^31 elements?

Halves of a projection, columns of longer rows, transposed, channels that are not neighbours, an odd offset: whatever lies
between is NaN. Expanded tensors, of stride 0, have a truth of their own. The largest cases are
those of `instruments.huge_tensors`.
"""

import functools
import math
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from harness.instruments import huge_tensors as vast
from harness.judge.case import Case
from harness.judge.registry import Implementation
from harness.judge.trial import Trial, worst_of
from harness.records.finding import Finding, Tally

draw = vast.draw


def cases(grid: str) -> list[Case]:
    """Odd sizes, just large enough to need few seeds, in which an operator has all that it has; on a GPU also the largest."""
    tokens = {"B": 3, "L": 19}
    points: list[tuple[str, dict[str, int], tuple[str, ...]]] = [
        ("scan", {"E": 74, "N": 16}, ()), ("scan", {"E": 74, "N": 16}, ("reverse", "state")),
        ("scan", {"E": 74, "N": 5}, ("groups=2", "reverse", "state")),
        ("conv", {"E": 74, "K": 4}, ()), ("conv", {"E": 74, "K": 4}, ("reverse", "state")),
        ("norm", {"D": 75}, ("kind=rms",)), ("norm", {"D": 75}, ("kind=layer", "low")),
    ]  # fmt: skip
    small = [
        Case(subject, tuple((tokens | dims).items()), (*options, "for=strides"), dtype)
        for subject, dims, options in points
        for dtype in ("float32", "bfloat16")
    ]
    return small if grid == "smoke" else small + vast.cases("strides")


def asks(subject: ModuleType, implementation: Implementation, case: Case) -> bool:
    """Of everything but the reference, in the cases above."""
    return implementation.name != "reference" and case.asker == "strides"


def run(trial: Trial, implementation: Implementation) -> list[Finding]:
    """Every layout by the rule, of all tensors at once."""
    if vast.is_vast(trial.case):
        return vast.judge(trial, implementation)
    found = [f for name, place in LAYOUTS.items() for f in laid(trial, implementation, name, place)]
    # Not along a norm's D: the values of a row would be equal, and their slopes the rounding of a cancellation.
    for axis in (0, 1) if trial.case.subject == "norm" else (0, 1, -1):
        found += laid(trial, implementation, f"expanded along {axis}", functools.partial(expanded, axis=axis), alike=False)
    return worst_of(found)


def laid(
    trial: Trial, implementation: Implementation, name: str, place: Callable[[Tensor], Tensor], alike: bool = True
) -> list[Finding]:
    """The rule for tensors in one layout; `alike` if it does not change their values."""
    tally, grad = Tally(), trial.asks_gradients

    def result(who: Implementation, seed: int, exact: bool = False) -> dict[str, Tensor | None]:
        leaves = {k: place(v) for k, v in trial.leaves(seed, exact).items()}
        return trial.run(
            who, seed, grad, leaves, cotangent=lambda what, output: place(trial.cotangent(seed, what, output))
        ).named()

    for seed in trial.case.seeds:
        plain, truth = trial.plain(seed, grad).named(), trial.truth(seed, grad).named()
        if not alike:
            plain, truth = result(trial.reference, seed), result(trial.reference, seed, exact=True)
        got = result(implementation, seed)
        for tensor, exact in truth.items():
            tally.add(f"{tensor}[{name}]", got.get(tensor), plain[tensor], exact)
    return tally.findings()


def second_half(x: Tensor) -> Tensor:
    """Columns n to 2n of rows of 2n."""
    return torch.cat([torch.full_like(x, math.nan), x], -1)[..., x.shape[-1] :]


def columns(x: Tensor) -> Tensor:
    """Columns 3 to 3+n of rows of 2n+3, as B stands in the rows of x_proj."""
    beside = torch.full_like(x, math.nan)
    return torch.cat([beside[..., :1].expand(*x.shape[:-1], 3), x, beside], -1)[..., 3 : 3 + x.shape[-1]]


def transposed(x: Tensor) -> Tensor:
    """The last two axes change places in memory."""
    return x if x.dim() < 2 else x.mT.contiguous().mT


def reversed_axes(x: Tensor) -> Tensor:
    """The first axis is the fastest."""
    back = tuple(range(x.dim()))[::-1]
    return x.permute(back).contiguous().permute(back)


def apart(x: Tensor) -> Tensor:
    """Every other element of the last axis."""
    return torch.stack([x, torch.full_like(x, math.nan)], -1)[..., 0]


def odd(x: Tensor) -> Tensor:
    """Contiguous, one element after where memory begins."""
    return torch.cat([x.new_full((1,), math.nan), x.flatten()])[1:].view(x.shape)


def expanded(x: Tensor, axis: int) -> Tensor:
    """The first entry of an axis stands for all."""
    return x.narrow(axis if axis < x.dim() else 0, 0, 1).expand_as(x)


LAYOUTS = {f.__name__: f for f in (second_half, columns, transposed, reversed_axes, apart, odd)}
