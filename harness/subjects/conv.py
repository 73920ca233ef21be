"""Causal convolution with SiLU, either direction."""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import reference
from fused.ops.causal_conv1d import api
from harness.fixtures.chains import chain_operator
from harness.instruments import symmetries
from harness.instruments.huge_tensors import CLIPS, huge_case
from harness.instruments.symmetries import Relation
from harness.judge import race
from harness.judge.case import LOW_PRECISIONS, Case, cross
from harness.judge.implementation import Implementation, Sample, fused_implementations
from harness.judge.layout_adapters import conv_from_mamba_ssm
from harness.judge.race import Race
from harness.records.ceilings import Ceilings, element_bytes
from harness.records.speed import Point

LAYOUTS = {"mamba_ssm": conv_from_mamba_ssm}
TIME = {"x": 1, "y": 1}
STATES = {"initial_state": 2, "final_state": 2}  # tokens in the order of time, whatever the direction


def cases(grid: str) -> list[Case]:
    """Return lengths around the window, where its edges are; in `full` also the model's own."""

    def shape(B: int, L: int, E: int, K: int) -> dict[str, int]:
        return {"B": B, "L": L, "E": E, "K": K}

    options: list[tuple[str, ...]] = [(), ("reverse",), ("state",), ("reverse", "state")]
    small = [
        *cross("conv", [shape(2, 3, 4, 3)], options, ["float64"]),
        *cross("conv", [shape(2, 1, 8, 4), shape(3, 7, 16, 4)], [*options, ("bare",)], LOW_PRECISIONS),
        *cross("conv", [shape(2, 2, 8, 3), shape(1, 63, 24, 2)], options, LOW_PRECISIONS),
    ]
    if grid == "smoke":
        return [*small, *cross("conv", [shape(1, 197, 64, 4)], options[2:], LOW_PRECISIONS)]
    return [
        *small,
        *cross("conv", [shape(2, 197, 384, 4), shape(1, 1569, 1152, 4)], options, LOW_PRECISIONS),
        *cross("conv", [shape(1, 12545, 64, 4)], [(), ("reverse", "state")], LOW_PRECISIONS),
    ]


def implementations() -> list[Implementation]:
    """Return the reference, and `fused.causal_conv1d` by backend."""

    def call_with(backend: str) -> Callable[..., Any]:
        return lambda *args, **options: api.causal_conv1d(*args, **options, backend=backend)

    fused = fused_implementations(api.BACKENDS, call_with, samples, cpu_samples=cpu_samples)
    return [Implementation("reference", reference.causal_conv1d), *fused]


def samples(case: Case, leaves: dict[str, Tensor]) -> list[Sample]:
    """Return the op that native registers."""
    importlib.import_module("fused.ops.causal_conv1d.native")
    tensors = (leaves.get(k) for k in ("x", "weight", "bias", "initial_state"))
    args = (*tensors, None, not case.has("bare"), case.has("reverse"))
    return [(torch.ops.videomamba.causal_conv1d.default, args, {})]


def cpu_samples(case: Case, leaves: dict[str, Tensor]) -> list[Sample]:
    """Return the op that the kernels for CPUs register, in the dtype that they compute in."""
    importlib.import_module("fused.ops.causal_conv1d.cpu")
    precise = {k: x.to(torch.promote_types(x.dtype, torch.float32)) for k, x in leaves.items()}
    options = not case.has("bare"), [case.has("reverse")]
    arguments = precise["x"], [precise["weight"]], [precise.get("bias")], precise.get("initial_state"), *options
    return [(torch.ops.videomamba.causal_conv1d_cpu.default, arguments, {})]


def draw(case: Case, seed: int) -> dict[str, Tensor]:
    """Draw x as in_proj gives it; weight and bias in the range of their initial values."""
    B, L, E, K = case["B"], case["L"], case["E"], case["K"]
    leaves = {"x": case.normal(seed, "x", B, L, E), "weight": 0.5 * case.normal(seed, "weight", E, K)}
    if not case.has("bare"):
        leaves["bias"] = 0.3 * case.normal(seed, "bias", E)
    if case.has("state"):
        leaves["initial_state"] = case.normal(seed, "initial_state", B, E, K - 1)
    return leaves


def precise(case: Case) -> set[str]:
    """Return the weights: they stay float32, as under autocast."""
    return {"weight", "bias"}


def no_cotangent(case: Case) -> set[str]:
    """Return the final state, unless a state is carried."""
    return set() if case.has("state") else {"final_state"}


def output_values(case: Case) -> int:
    """Return the values of y."""
    return case["B"] * case["L"] * case["E"]


def steps(case: Case) -> float:
    """Return the memory traffic: there are no sequential steps."""
    return 1 + case["B"] * case["L"] * case["E"] / 1e6


def time_axes(case: Case) -> dict[str, int]:
    """Return axis 1 for everything with tokens."""
    return TIME


def num_units(case: Case) -> int:
    """Return the tokens."""
    return case["L"]


def per_clip(case: Case) -> set[str]:
    """Return tokens and states."""
    return {"x", "initial_state"}


def evaluate(call: Callable[..., Any], case: Case, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return y and the final state; `bare` is without bias and activation."""
    activation = None if case.has("bare") else "silu"
    y, final = call(
        leaves["x"], leaves["weight"], leaves.get("bias"),
        activation=activation, initial_state=leaves.get("initial_state"), reverse=case.has("reverse"),
    )  # fmt: skip
    return {"y": y, "final_state": final}


def chunked(call: Callable[..., Any], case: Case, leaves: dict[str, Tensor], cuts: tuple[int, ...]) -> dict[str, Tensor]:
    """Return the outputs of chunks in the direction's order, each from the state that the one before left."""
    return chain_operator(lambda part: evaluate(call, case, part), leaves, cuts, case["L"], TIME, case.has("reverse"))


def costly_checks(case: Case) -> set[str]:
    """Return `writes` for all cases, and at one odd size `device` and, with all options, `compile`."""
    if case.fits(B=3, L=7):
        return {"writes"} | {(): {"device"}, ("reverse", "state"): {"device", "compile"}}.get(case.options, set())
    return {"writes"}


def special_cases(check: str, grid: str) -> list[Case]:
    """Return cases for `strides` and `invariants`, and one NaN for `extremes`."""
    if check == "strides":
        options: list[tuple[str, ...]] = [("for=strides",), ("reverse", "state", "for=strides")]
        small = cross("conv", [{"B": 3, "L": 19, "E": 74, "K": 4}], options, LOW_PRECISIONS[:2])
        huge = huge_case(check, "conv", CLIPS, {"B": 1, "L": 17, "E": 1008, "K": 4})
        return small if grid == "smoke" else [*small, huge]
    if check == "extremes":
        dtypes = LOW_PRECISIONS[:2] if grid == "smoke" else LOW_PRECISIONS
        words: list[tuple[str, ...]] = [("nan", "for=extremes"), ("nan", "reverse", "for=extremes")]
        return cross("conv", [{"B": 2, "L": 9, "E": 6, "K": 4}], words, dtypes)
    if check == "invariants":
        sizes = [{"B": 2, "L": 19, "E": 12, "K": 4}] + [{"B": 2, "L": 1569, "E": 384, "K": 4}] * (grid != "smoke")
        every: list[tuple[str, ...]] = [("state", "for=invariants"), ("bare", "reverse", "state", "for=invariants")]
        return cross("conv", sizes, every, LOW_PRECISIONS[:2])
    return []


def invariants(case: Case) -> dict[str, Relation]:
    """Return those of a sum over neighbours, which without bias and activation is linear."""
    found = {
        "reversal": symmetries.reversal(TIME | STATES), "concatenation": symmetries.concatenation(case["L"]),
        "permutation": symmetries.permutation(per_clip(case)),
    }  # fmt: skip
    if case.has("bare"):
        found["superposition"] = symmetries.superposition(("x",), TIME)
        found["homogeneity"] = symmetries.homogeneity(("x", "initial_state"))
    return found


def races() -> list[Race]:
    """Return the race of windows of 4."""

    def points(grid: str) -> list[Point]:
        return race.operator_points("conv", grid, lambda B, E, L: {"B": B, "L": L, "E": E, "K": 4})

    words = lambda n: f"convolution, {race.rows(n)}, {n['E']:,} channels"  # noqa: E731
    return [Race("conv", order=3, points=points, contenders=(("conv", ""),), title="the convolution", words=words)]


def licence(dtype: str) -> tuple[str, ...]:
    """Return one case in either direction."""
    return f"B2-L197-E384-K4-{dtype}", f"B2-L197-E384-K4-reverse-{dtype}"


def bound(point: Point, variant: str, ceilings: Ceilings) -> float:
    """Return the seconds of the memory traffic: x and y, in training also x, dy and dx."""
    tensors = 5 if point.mode == "train" else 2
    return point.tokens * point["E"] * element_bytes(point.dtype) * tensors / ceilings.copy
