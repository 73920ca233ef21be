"""Relations between two calls of one implementation that hold without a reference, since the equation has a symmetry.

Each function returns a relation: called with a run and the leaves of a case, it gives what is due and what came, by the names
of outputs. Leaves are the rounded ones, which every relation only copies, cuts, flips or sets to zero, so that both sides see
the same numbers.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from harness.judge.case import Case

Named = dict[str, Tensor]
Run = Callable[..., Named]  # run(case, leaves, cuts=None) gives the outputs of an implementation
Relation = Callable[[Run, Case, Named], tuple[Named, Named]]
AHEAD = 5  # tokens that do nothing, before the sequence


def superposition(names: tuple[str, ...], axes: Mapping[str, int], state: str = "initial_state") -> Relation:
    """Return: what even tokens give, and what odd tokens and the state give, add up to the whole. `names` are linear inputs."""

    def relation(run: Run, case: Case, leaves: Named) -> tuple[Named, Named]:
        def part(parity: int) -> Named:
            given = dict(leaves)
            for name in names:
                tokens = torch.arange(leaves[name].shape[axes[name]], device=leaves[name].device)
                shape = [-1 if axis == axes[name] else 1 for axis in range(leaves[name].dim())]
                given[name] = leaves[name] * (tokens % 2 == parity).view(shape)
            if state in leaves and not parity:
                given[state] = torch.zeros_like(leaves[state])
            return run(case, given)

        whole, even, odd = run(case, leaves), part(0), part(1)
        return whole, {k: (even[k].double() + odd[k].double()).to(whole[k].dtype) for k in whole}

    return relation


def homogeneity(names: tuple[str, ...]) -> Relation:
    """Return: twice the inputs `names`, in which the equation is linear, give twice the results. 2 multiplies exactly."""

    def relation(run: Run, case: Case, leaves: Named) -> tuple[Named, Named]:
        doubled = leaves | {k: 2 * leaves[k] for k in names if k in leaves}
        return {k: 2 * v for k, v in run(case, leaves).items()}, run(case, doubled)

    return relation


def shift(idle: Mapping[str, float], axes: Mapping[str, int]) -> Relation:
    """Return: tokens before the first change nothing if their step is zero, which leaves of the values `idle` make it."""

    def relation(run: Run, case: Case, leaves: Named) -> tuple[Named, Named]:
        later = dict(leaves)
        for name, axis in axes.items():
            if name in leaves:
                ahead = leaves[name].narrow(axis, 0, 1).repeat_interleave(AHEAD, axis)
                ahead = torch.full_like(ahead, idle[name]) if name in idle else ahead
                ends = (leaves[name], ahead) if case.has("reverse") else (ahead, leaves[name])
                later[name] = torch.cat(ends, axis)
        dims = tuple((k, n + AHEAD * (k == "L")) for k, n in case.dims)
        got = run(replace(case, dims=dims), later)
        start = 0 if case.has("reverse") else AHEAD
        return run(case, leaves), {k: v.narrow(axes[k], start, case["L"]) if k in axes else v for k, v in got.items()}

    return relation


def identity(idle: Mapping[str, float]) -> Relation:
    """Return: where every step is zero the state that enters is the state that leaves."""

    def relation(run: Run, case: Case, leaves: Named) -> tuple[Named, Named]:
        stopped = leaves | {k: torch.full_like(leaves[k], value) for k, value in idle.items()}
        return {"final_state": leaves["initial_state"]}, {"final_state": run(case, stopped)["final_state"]}

    return relation


def reversal(axes: Mapping[str, int], exchange: Callable[[Named], Named] | None = None) -> Relation:
    """Return: the other direction over reversed tokens gives reversed results.

    Without `exchange` the other direction is the option "reverse"; else it exchanges the weights of two directions.
    """

    def flipped(tensors: Named) -> Named:
        return {k: v.flip(axes[k]) if k in axes else v for k, v in tensors.items()}

    def relation(run: Run, case: Case, leaves: Named) -> tuple[Named, Named]:
        if exchange is not None:
            return run(case, leaves), flipped(run(case, exchange(flipped(leaves))))
        kept = tuple(o for o in case.options if o != "reverse")
        other = replace(case, options=kept if case.has("reverse") else (*kept, "reverse"))
        return run(case, leaves), flipped(run(other, flipped(leaves)))

    return relation


def concatenation(units: int) -> Relation:
    """Return: a sequence of so many units, cut in three and chained by its state, gives what the whole gives."""

    def relation(run: Run, case: Case, leaves: Named) -> tuple[Named, Named]:
        return run(case, leaves), run(case, leaves, tuple(sorted({0, units // 3, units - 1})))

    return relation


def permutation(names: set[str]) -> Relation:
    """Return: clips in another order give their results in that order. `names` are leaves with an entry per clip."""

    def relation(run: Run, case: Case, leaves: Named) -> tuple[Named, Named]:
        turned = {k: v.roll(1, 0) if k in names else v for k, v in leaves.items()}
        return run(case, leaves), {k: v.roll(-1, 0) for k, v in run(case, turned).items()}

    return relation


def of_recurrence(
    linear: str, idle: Mapping[str, float], axes: Mapping[str, int], units: int, clips: set[str]
) -> dict[str, Relation]:
    """Return those of a recurrence that is linear in `linear` and in the state, and stands still where a step is zero."""
    return {
        "superposition": superposition((linear,), axes), "homogeneity": homogeneity((linear, "initial_state")),
        "shift": shift(idle, axes), "identity": identity(idle), "reversal": reversal(axes),
        "concatenation": concatenation(units), "permutation": permutation(clips),
    }  # fmt: skip
