"""Causal convolution with SiLU, either direction."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import reference
from fused.ops.causal_conv1d import api
from harness.judge.case import Case, cross
from harness.judge.registry import Implementation, Sample, fused_implementations
from harness.subjects.scan import EVERY, chain

TIME = {"x": 1, "y": 1}


def cases(grid: str) -> list[Case]:
    """Lengths around the window, where its edges are; in `full` also the model's own."""

    def shape(B: int, L: int, E: int, K: int) -> dict[str, int]:
        return {"B": B, "L": L, "E": E, "K": K}

    options: list[tuple[str, ...]] = [(), ("reverse",), ("state",), ("reverse", "state")]
    small = [
        *cross("conv", [shape(2, 3, 4, 3)], options, ["float64"]),
        *cross("conv", [shape(2, 1, 8, 4), shape(3, 7, 16, 4)], [*options, ("bare",)], EVERY),
        *cross("conv", [shape(2, 2, 8, 3), shape(1, 63, 24, 2)], options, EVERY),
    ]
    if grid == "smoke":
        return [*small, *cross("conv", [shape(1, 197, 64, 4)], options[2:], EVERY)]
    return [
        *small,
        *cross("conv", [shape(2, 197, 384, 4), shape(1, 1569, 1152, 4)], options, EVERY),
        *cross("conv", [shape(1, 12545, 64, 4)], [(), ("reverse", "state")], EVERY),
    ]


def implementations() -> list[Implementation]:
    """The reference, and `fused.causal_conv1d` by backend."""

    def call_with(backend: str) -> Callable[..., Any]:
        return lambda *args, **options: api.causal_conv1d(*args, **options, backend=backend)

    return [Implementation("reference", reference.causal_conv1d), *fused_implementations(api.BACKENDS, call_with, samples)]


def samples(case: Case, leaves: dict[str, Tensor]) -> list[Sample]:
    """The op that native registers."""
    args = (*(leaves.get(k) for k in ("x", "weight", "bias", "initial_state")), not case.has("bare"), case.has("reverse"))
    return [(torch.ops.videomamba.causal_conv1d.default, args, {})]


def draw(case: Case, seed: int) -> dict[str, Tensor]:
    """x as in_proj gives it; weight and bias in the range of their initial values."""
    B, L, E, K = case["B"], case["L"], case["E"], case["K"]
    leaves = {"x": case.normal(seed, "x", B, L, E), "weight": 0.5 * case.normal(seed, "weight", E, K)}
    if not case.has("bare"):
        leaves["bias"] = 0.3 * case.normal(seed, "bias", E)
    if case.has("state"):
        leaves["initial_state"] = case.normal(seed, "initial_state", B, E, K - 1)
    return leaves


def precise(case: Case) -> set[str]:
    """Weights stay float32, as under autocast."""
    return {"weight", "bias"}


def silent(case: Case) -> set[str]:
    """The final state has a cotangent where a state is carried."""
    return set() if case.has("state") else {"final_state"}


def steps(case: Case) -> float:
    """No sequential steps, some memory traffic."""
    return 1 + case["B"] * case["L"] * case["E"] / 1e6


def time_axes(case: Case) -> dict[str, int]:
    """Everything with tokens has them on axis 1."""
    return TIME


def clips(case: Case) -> set[str]:
    """Tokens and states have them."""
    return {"x", "initial_state"}


def evaluate(call: Callable[..., Any], case: Case, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """y and the final state; `bare` is without bias and activation."""
    activation = None if case.has("bare") else "silu"
    y, final = call(
        leaves["x"], leaves["weight"], leaves.get("bias"),
        activation=activation, initial_state=leaves.get("initial_state"), reverse=case.has("reverse"),
    )  # fmt: skip
    return {"y": y, "final_state": final}


def chunked(call: Callable[..., Any], case: Case, leaves: dict[str, Tensor], cuts: tuple[int, ...]) -> dict[str, Tensor]:
    """Chunks in walking order, each from the state that the one before left."""
    return chain(lambda part: evaluate(call, case, part), case, leaves, cuts, TIME)
