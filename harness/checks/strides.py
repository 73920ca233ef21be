"""Do inputs and cotangents give the same wherever they lie in memory: any stride, any offset, more than 2^31 elements?

Halves of a projection, columns of longer rows, transposed, channels that are not neighbours, an odd offset: whatever lies
between is NaN. Expanded tensors, of stride 0, have a truth of their own. The largest cases are
those of `instruments.huge_tensors`.
"""

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from harness.instruments import huge_tensors
from harness.judge.case import Case
from harness.judge.implementation import Implementation
from harness.judge.protocols import RestrictedExpansion, Subject
from harness.judge.trial import Trial, worst_of
from harness.records.finding import Finding, Tally


def asks(subject: Subject, implementation: Implementation, case: Case) -> bool:
    """Return True of everything but the reference, in cases for it."""
    return implementation.name != "reference" and case.only_check == "strides"


def run(trial: Trial, implementation: Implementation) -> list[Finding]:
    """Apply the rule to every layout, of all tensors at once."""
    if huge_tensors.repetitions(trial.case):
        return huge_tensors.judge(trial, implementation)
    found = [f for name, place in LAYOUTS.items() for f in in_layout(trial, implementation, name, place)]
    axes = trial.subject.expanded_axes() if isinstance(trial.subject, RestrictedExpansion) else (0, 1, -1)
    for axis in axes:
        place = functools.partial(expanded, axis=axis)
        found += in_layout(trial, implementation, f"expanded along {axis}", place, same_values=False)
    return worst_of(found)


def in_layout(
    trial: Trial, implementation: Implementation, name: str, place: Callable[[Tensor], Tensor], same_values: bool = True
) -> list[Finding]:
    """Apply the rule to tensors in one layout; `same_values` if it does not change their values."""
    tally, grad = Tally(), trial.asks_gradients

    def result(runner: Implementation, seed: int, exact: bool = False) -> dict[str, Tensor | None]:
        leaves = {k: place(v) for k, v in trial.leaves(seed, exact).items()}
        return trial.run(
            runner, seed, grad, leaves, cotangent=lambda output_name, output: place(trial.cotangent(seed, output_name, output))
        ).named()

    for seed in trial.seeds:
        plain, truth = trial.plain(seed, grad).named(), trial.truth(seed, grad).named()
        if not same_values:
            plain, truth = result(trial.reference, seed), result(trial.reference, seed, exact=True)
        got = result(implementation, seed)
        for tensor, exact in truth.items():
            tally.add(f"{tensor}[{name}]", got.get(tensor), plain[tensor], exact)
    return tally.findings()


def second_half(x: Tensor) -> Tensor:
    """Return columns n to 2n of rows of 2n."""
    return torch.cat([torch.full_like(x, math.nan), x], -1)[..., x.shape[-1] :]


def columns(x: Tensor) -> Tensor:
    """Return columns 3 to 3+n of rows of 2n+3, as B stands in the rows of x_proj."""
    nans = torch.full_like(x, math.nan)
    return torch.cat([nans[..., :1].expand(*x.shape[:-1], 3), x, nans], -1)[..., 3 : 3 + x.shape[-1]]


def transposed(x: Tensor) -> Tensor:
    """Return x with the last two axes exchanged in memory."""
    return x if x.dim() < 2 else x.mT.contiguous().mT


def reversed_axes(x: Tensor) -> Tensor:
    """Return x with the first axis as the fastest."""
    back = tuple(range(x.dim()))[::-1]
    return x.permute(back).contiguous().permute(back)


def apart(x: Tensor) -> Tensor:
    """Return x as every other element of the last axis of its memory."""
    return torch.stack([x, torch.full_like(x, math.nan)], -1)[..., 0]


def odd(x: Tensor) -> Tensor:
    """Return x contiguous, one element after where memory begins."""
    return torch.cat([x.new_full((1,), math.nan), x.flatten()])[1:].view(x.shape)


def expanded(x: Tensor, axis: int) -> Tensor:
    """Return the first entry of an axis, expanded to all."""
    return x.narrow(axis if axis < x.dim() else 0, 0, 1).expand_as(x)


LAYOUTS = {f.__name__: f for f in (second_half, columns, transposed, reversed_axes, apart, odd)}
