"""The way from a failing question to the bug: its first wrong token in either direction, which edge of the kernel's tiles that
token is at, and the shortest prefix of the sequence that fails.

Nothing here is asked of what passes. The implementation is run again for it, so that a fault which comes and goes may not show.
"""

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from harness.judge.case import Case
from harness.judge.implementation import Implementation
from harness.judge.protocols import HasEdges, HasTokens
from harness.judge.trial import Named, Trial
from harness.records.finding import Finding, Tally, unit_roundoff
from harness.records.location import Location, WrongTokens

NORMS = ("l2", "max", "zero")  # of findings that are comparisons with the truth
MAX_TENSORS = 3
MAX_SEEDS = 4
SEARCH_SECONDS = 5.0  # after which no further length is tried
MAX_LONGER = 3  # lengths that are tried beyond the shortest that fails
MIN_MULTIPLE = 8  # that is worth a word where no known edge is


def locate(trial: Trial, implementation: Implementation, findings: Sequence[Finding], search: bool = True) -> Location | None:
    """Return where the failing findings fail, None where nothing can be said; with `search`, from which length on too.

    Findings on parts of tensors (`y[3:7]`) say themselves where they are, and are left alone.
    """
    failing = {f.tensor: f.ratio for f in sorted(findings, key=lambda f: f.ratio) if not f.passed and f.norm in NORMS}
    failing = {name: ratio for name, ratio in failing.items() if "[" not in name}
    if not failing or not isinstance(trial.subject, HasTokens):
        return None
    grad = any(name.startswith("grad ") for name in failing)
    seeds = [seed for seed in trial.seeds if trial.knows(seed, grad)][:MAX_SEEDS]
    if not seeds:
        return None
    axes, edges = trial.subject.time_axes(trial.case), _edges(trial, implementation, trial.case)
    errors: dict[str, _Errors] = {}
    for seed in seeds:
        plain, truth = trial.plain(seed, grad).named(), trial.truth(seed, grad).named()
        got = trial.got(implementation, seed, grad).named()
        for name in failing:
            axis, exact = axes.get(name.removeprefix("grad ")), truth.get(name)
            if axis is not None and exact is not None:
                errors.setdefault(name, _Errors()).add(got.get(name), plain[name], exact, axis)
    wrong = [found for name in failing if name in errors and (found := _wrong_tokens(trial, name, errors[name], edges))]
    wrong.sort(key=lambda tokens: (tokens.tensor.startswith("grad "), -failing[tokens.tensor]))
    shortest, lengths = _Search(trial, implementation, failing, grad).run() if search else (0, "")
    return Location(tuple(wrong[:MAX_TENSORS]), shortest, lengths) if wrong or lengths else None


class _Errors:
    """The errors of one tensor by token, in l2 and max: of got and plain, beside the size of the truth, pooled over seeds."""

    def __init__(self) -> None:
        self.squares: list[Tensor] = []  # (got, plain, truth; l2, max; tokens) of every seed
        self.unit = 0.0

    def add(self, got: Tensor | None, plain: Tensor | None, truth: Tensor, axis: int) -> None:
        """Add a seed. What has another shape than the truth is wrong everywhere."""
        assert plain is not None
        self.unit = unit_roundoff(plain.dtype)
        exact = truth.double()
        if got is None or got.shape != truth.shape:
            off = torch.full_like(exact, torch.inf)
        else:
            off = torch.where(got.isfinite(), (got.double() - exact).abs(), torch.inf)
        rows = [t.movedim(axis, 0).flatten(1) for t in (off, (plain.double() - exact).abs(), exact.abs())]
        self.squares.append(torch.stack([torch.stack([r.square().sum(1), r.amax(1).square()]) for r in rows]))

    def wrong(self) -> Tensor:
        """Return the indices of the tokens whose error exceeds, in either norm, what the worst token of plain may have."""
        got, plain, truth = torch.stack(self.squares).mean(0).sqrt()
        most = 2 * plain.amax(1, keepdim=True) + self.unit * truth.amax(1, keepdim=True)
        return (~(got <= most)).any(0).nonzero().flatten()


Edges = dict[str, Collection[int]]  # where the parts begin into which a kernel divides the tokens, by the name of the parts


def _edges(trial: Trial, implementation: Implementation, case: Case) -> Edges:
    """Return the edges of the implementation's parts of a case's tokens, as the subject knows them."""
    if implementation.backend is None or not isinstance(trial.subject, HasEdges):
        return {}
    return trial.subject.edges(case, implementation.backend, trial.device)


def _shorter(case: Case, length: int) -> Case:
    """Return the case with fewer tokens."""
    return replace(case, dims=tuple((letter, length if letter == "L" else size) for letter, size in case.dims))


def _wrong_tokens(trial: Trial, name: str, errors: _Errors, edges: Edges) -> WrongTokens | None:
    """Return the wrong tokens of a tensor; None if no single one stands out."""
    found, total = errors.wrong(), errors.squares[0].shape[-1]
    if not len(found):
        return None
    first, last, sizes = int(found[0]), int(found[-1]), dict(trial.case.dims)
    if total != sizes["L"]:  # a model's: no kernel divides these
        return WrongTokens(name, "frame" if total == sizes.get("T") else "position", total, len(found), first, last)
    words = describe_edge(first, total, edges), describe_edge(last + 1, total, edges)
    return WrongTokens(name, "token", total, len(found), first, last, *words)


def describe_edge(edge: int, total: int, edges: Edges) -> str:
    """Return which parts of a kernel meet between the tokens `edge - 1` and `edge`, or which power of two divides `edge`.

    Return "" if nothing is there, and at the ends of the sequence.
    """
    if not 0 < edge < total:
        return ""
    if meeting := [name for name, at in edges.items() if edge in at]:
        return f"the first after the edge at {edge} ({', '.join(meeting)})"
    multiple = edge & -edge
    return f"the first after {edge}, a multiple of {multiple}" if multiple >= MIN_MULTIPLE else ""


@dataclass
class _Search:
    """A search for the shortest prefix, in the order of the scan, of which the failing tensors fail."""

    trial: Trial
    implementation: Implementation
    failing: dict[str, float]
    grad: bool

    def run(self) -> tuple[int, str]:
        """Return the length of the shortest failing prefix that was found, 0 for none, and what is known in words."""
        total, begin = self.trial.case["L"], time.perf_counter()
        axes = self.trial.subject.time_axes(self.trial.case)
        sizes = {leaf.shape[axes[name]] for name, leaf in self.trial.leaves(0).items() if name in axes}
        if sizes != {total}:
            return 0, ""  # a model: its clip has frames, its positions are those of the whole
        tried: dict[int, bool] = {}

        def fails(length: int) -> bool | None:
            if length not in tried:
                if time.perf_counter() - begin > SEARCH_SECONDS:
                    return None
                tried[length] = self._fails(length)
            return tried[length]

        shortest, in_time = shortest_failing(fails, candidates(total), total)
        if not in_time:
            known = f"up to {max(tried)} tokens none does" if tried and not any(tried.values()) else f"tried: {_list(tried)}"
            return 0, f"from which length on it fails was not found within {SEARCH_SECONDS:.0f} s; {known}"
        longer = [n for n in candidates(total) if n > shortest + 1]
        for length in [n for n in (shortest + 1, *longer[: MAX_LONGER - 1]) if n < total]:
            fails(length)
        return shortest, self._words(shortest, total, tried)

    def _fails(self, length: int) -> bool:
        """Return whether a prefix clearly fails, with one seed: of few tokens the ratio of two rounding errors is a lottery."""
        trial, case, tally = self.trial, self.trial.case, Tally()
        part = Trial(_shorter(case, length), trial.device)
        dtypes: dict[str, torch.dtype] = {}

        def cotangent(name: str, output: Tensor) -> Tensor:
            low = dtypes.setdefault(name, output.dtype)  # plain's, which is asked first
            return case.normal(0, "cotangent " + name, *output.shape).to(low).to(output.device, output.dtype)

        def run(runner: Implementation, exact: bool) -> dict[str, Tensor | None]:
            leaves = self._cut(trial.leaves(0, exact), length)
            return part.run(runner, 0, self.grad, leaves, cotangent=cotangent).named()

        plain, truth, got = run(trial.reference, False), run(trial.reference, True), run(self.implementation, False)
        for name in self.failing:
            tally.add(name, got.get(name), plain.get(name), truth.get(name))
        clear = min(2.0, max(1.0, max(self.failing.values()) / 2))
        return any(not f.passed and f.ratio > clear for f in tally.findings())

    def _cut(self, leaves: Named, length: int) -> Named:
        """Return the first tokens in the order of the scan."""
        axes, start = self.trial.subject.time_axes(self.trial.case), 0
        if self.trial.case.has("reverse"):
            start = self.trial.case["L"] - length
        return {k: v.narrow(axes[k], start, length).clone() if k in axes else v for k, v in leaves.items()}

    def _words(self, shortest: int, total: int, tried: dict[int, bool]) -> str:
        """Return the shortest failing length in words, the edge at its last token, and which longer ones pass."""
        order = " in reverse order" * self.trial.case.has("reverse")
        if shortest == total:
            return f"of the lengths tried only all {total} tokens fail ({_list(tried)})"
        passes = f", {shortest - 1} pass" if shortest > 1 else ""
        edges = _edges(self.trial, self.implementation, _shorter(self.trial.case, shortest))  # of the cut tokens by themselves
        edge = describe_edge(shortest - 1, shortest, edges)
        longer = [n for n in tried if n > shortest]
        again = [n for n in longer if not tried[n]]
        beyond = f"; {_list(again)} pass again" if again else f"; so do {_list(longer)}" if longer else ""
        what = f"the first {shortest} tokens{order} fail" if shortest > 1 else f"the first token{order} fails by itself"
        return f"{what}{passes}" + f", and the last of them is {edge}" * bool(edge) + beyond


def candidates(total: int) -> list[int]:
    """Return lengths below `total` to try: powers of two, and one less, which fill a tile and leave one short."""
    near = {2**power - step for power in range(total.bit_length() + 1) for step in (0, 1)}
    return sorted(n for n in near if 0 < n < total)


def shortest_failing(fails: Callable[[int], bool | None], lengths: Sequence[int], total: int) -> tuple[int, bool]:
    """Return the shortest of the lengths that fails, made shorter by bisection, and whether the search came to its end.

    `fails` returns None when the time is spent. The total is known to fail. Lengths between two that pass are not tried.
    """
    passing, failing = 0, total
    for length in lengths:
        failed = fails(length)
        if failed is None:
            return 0, False
        if failed:
            failing = length
            break
        passing = length
    while failing - passing > 1:
        middle = (passing + failing) // 2
        failed = fails(middle)
        if failed is None:
            return 0, False
        passing, failing = (passing, middle) if failed else (middle, failing)
    return failing, True


def _list(lengths: Collection[int]) -> str:
    """Return some lengths in words."""
    return ", ".join(str(n) for n in sorted(lengths)[:12]) + ", ..." * (len(lengths) > 12)
