"""Baselines of BIMBA's compressor: other ways to as few tokens, each against its own naive form."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from harness.baselines.resamplers import PerceiverResampler, Pooling, SelfAttention
from harness.fixtures import functional_modules as modules
from harness.judge.case import Case
from harness.judge.implementation import Implementation
from harness.judge.race import timed_precision
from harness.records.ceilings import Ceilings, element_bytes
from harness.records.speed import Point
from harness.subjects import bimba

KINDS: dict[str, Callable[[int, str], nn.Module]] = {
    "pooling": lambda D, kind: Pooling(), "perceiver": PerceiverResampler, "attention": SelfAttention
}  # fmt: skip


@dataclass(frozen=True)
class Baseline(Implementation):
    """A way, by its name, whose first word is one of `KINDS`. Nothing here is our product: all are rivals."""

    rival: bool = True

    def missing(self, case: Case) -> str | None:
        way = self.name.partition("-")[0]
        return None if case.has(way) else f"{self.name} computes cases of {way} only"


def cases(grid: str) -> list[Case]:
    """Return even and odd frames, whole frames and means over two, of every kind."""
    shapes = bimba.sizes(2, 4, 4, 6, 2, 6, 16), bimba.sizes(1, 3, 5, 5, 3, 9, 16), bimba.sizes(1, 4, 6, 6, 1, 9, 256)
    return modules.in_precisions([(s, (kind,)) for kind in KINDS for s in shapes], "resamplers", half=grid != "smoke")


@functools.lru_cache(maxsize=1)
def implementations() -> list[Implementation]:
    """Return the naive form of every kind, and what is timed: pooling, and attention by PyTorch's choice and naive."""

    def of(kind: str, computed: str) -> Callable[[Case], nn.Module]:
        return lambda case: KINDS[kind](case["D"], computed)

    return [
        Implementation("reference", lambda case: KINDS[kind_of(case)](case["D"], "naive")),
        Baseline("pooling", of("pooling", "")),
        Baseline("perceiver", of("perceiver", "sdpa")),
        Baseline("attention-sdpa", of("attention", "sdpa")),
        Baseline("attention-naive", of("attention", "naive")),
    ]


def kind_of(case: Case) -> str:
    """Return the kind of a case; a timed case, which has none, has the parameters of attention."""
    return next((kind for kind in KINDS if case.has(kind)), "attention")


def module_of(call: Callable[..., Any], case: Case) -> nn.Module:
    """Return the module of a case. No one loads its weights, so that no check asks for their layout."""
    return call(case)


def draw(case: Case, seed: int) -> dict[str, Tensor]:
    """Draw tokens, queries and parameters of unit gain."""
    B, F, H, W, G, Q, D, _ = (size for _, size in case.dims)
    inputs = {"tokens": case.normal(seed, "tokens", B, F, H, W, D)}
    if kind_of(case) != "pooling":  # reads their shape only
        inputs["queries"] = case.normal(seed, "queries", B, G, Q, D)
    return inputs | modules.parameters(modules.on_meta(module_of, implementations()[0].call, case), case, seed)


def precise(case: Case) -> set[str]:
    """Return those of `functional_modules.precise`."""
    inputs = {"tokens"} if kind_of(case) == "pooling" else {"tokens", "queries"}
    return modules.precise(case, modules.on_meta(module_of, implementations()[0].call, case), inputs, set())


def no_cotangent(case: Case) -> set[str]:
    """Return nothing: the only output has a cotangent."""
    return set()


def output_values(case: Case) -> int:
    """Return the values of the queries."""
    return case["B"] * case["G"] * case["Q"] * case["D"]


def steps(case: Case) -> float:
    """Return the time of the truth in that of a scan's step: there is no scan."""
    return 50.0


def evaluate(call: Callable[..., Any], case: Case, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tokens that go on."""
    tokens = leaves["tokens"]
    queries = leaves.get("queries", tokens.new_empty(()).expand(case["B"], case["G"], case["Q"], case["D"]))
    module = modules.on_meta(module_of, call, case)
    with modules.precision(case, leaves):
        return {"out": modules.call(module, leaves, lambda m, t, q: m(t, q), tokens, queries)}


def licence(dtype: str) -> tuple[str, ...]:
    """Return the widest case of every kind."""
    return (f"B1-F4-H6-*-D256-*-{timed_precision(dtype)}",)


def bound(point: Point, variant: str, ceilings: Ceilings) -> float:
    """Return the least seconds of any of these ways: the tokens are read once, in training their gradients are written."""
    tokens, queries = (point["B"] * n for n in (point["F"] * point["H"] * point["W"], point["G"] * point["Q"]))
    passes = 2 if point.mode == "train" else 1
    return passes * (tokens + queries) * point["D"] * element_bytes(point.dtype) / ceilings.copy
