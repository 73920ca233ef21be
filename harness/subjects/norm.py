"""Add and normalise, RMS and LayerNorm."""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import reference
from fused.ops.add_norm import api
from harness.instruments.huge_tensors import CLIPS, huge_case
from harness.judge import race
from harness.judge.case import LOW_PRECISIONS, Case, cross
from harness.judge.implementation import Implementation, Sample, fused_implementations
from harness.judge.race import Race
from harness.records.ceilings import Ceilings, element_bytes
from harness.records.speed import Point


def cases(grid: str) -> list[Case]:
    """Return both kinds, with and without a residual, prenorm or not, residual in float32 or in x's dtype."""

    def shape(B: int, L: int, D: int) -> dict[str, int]:
        return {"B": B, "L": L, "D": D}

    options: list[tuple[str, ...]] = [
        (f"kind={kind}", *rest) for kind in ("rms", "layer") for rest in ((), ("first",), ("last",), ("low",), ("low", "first"))
    ]
    small = [
        *cross("norm", [shape(2, 3, 8)], options, ["float64"]),
        *cross("norm", [shape(1, 1, 32), shape(2, 9, 33)], options, LOW_PRECISIONS),
    ]
    if grid == "smoke":
        return [*small, *cross("norm", [shape(1, 197, 192)], options[::5], LOW_PRECISIONS)]
    return [
        *small,
        *cross("norm", [shape(2, 1569, 576)], options, LOW_PRECISIONS),
        *cross("norm", [shape(1, 12545, 192)], options[:1], LOW_PRECISIONS),
    ]


def implementations() -> list[Implementation]:
    """Return the reference, and `fused.add_norm` by backend."""

    def call_with(backend: str) -> Callable[..., Any]:
        return lambda *args, **options: api.add_norm(*args, **options, backend=backend)

    fused = fused_implementations(api.BACKENDS, call_with, samples, cpu_samples=cpu_samples)
    return [Implementation("reference", reference.add_norm), *fused]


def samples(case: Case, leaves: dict[str, Tensor]) -> list[Sample]:
    """Return the op that native registers; it stores the residual unrounded."""
    importlib.import_module("fused.ops.add_norm.native")
    tensors = (leaves.get(k) for k in ("x", "weight", "bias", "residual"))
    options = (None, 1.0, 1e-5, case.option("kind", "rms") == "layer", torch.float32)
    return [(torch.ops.videomamba.add_norm.default, (*tensors, *options), {})]


def cpu_samples(case: Case, leaves: dict[str, Tensor]) -> list[Sample]:
    """Return the op that the kernels for CPUs register, in the dtype that they compute in."""
    importlib.import_module("fused.ops.add_norm.cpu")
    precise = {k: x.to(torch.promote_types(x.dtype, torch.float32)) for k, x in leaves.items()}
    tensors = (precise.get(k) for k in ("x", "residual", "weight", "bias"))
    return [(torch.ops.videomamba.add_norm_cpu.default, (*tensors, 1e-5, case.option("kind", "rms") == "layer"), {})]


def draw(case: Case, seed: int) -> dict[str, Tensor]:
    """Draw a residual stream three times as large as what is added, with a mean that LayerNorm must remove."""
    B, L, D = case["B"], case["L"], case["D"]
    leaves = {"x": case.normal(seed, "x", B, L, D), "weight": 1 + 0.1 * case.normal(seed, "weight", D)}
    if case.option("kind", "rms") == "layer":
        leaves["bias"] = 0.1 * case.normal(seed, "bias", D)
    if not case.has("first"):
        leaves["residual"] = 3 * case.normal(seed, "residual", B, L, D) + 1
    return leaves


def precise(case: Case) -> set[str]:
    """Return the weights and the residual, unless it is `low`."""
    return {"weight", "bias"} | (set() if case.has("low") else {"residual"})


def no_cotangent(case: Case) -> set[str]:
    """Return nothing: every output has a cotangent."""
    return set()


def output_values(case: Case) -> int:
    """Return the values of y."""
    return case["B"] * case["L"] * case["D"]


def steps(case: Case) -> float:
    """Return the memory traffic: there are no sequential steps."""
    return 1 + case["B"] * case["L"] * case["D"] / 1e6


def time_axes(case: Case) -> dict[str, int]:
    """Return axis 1 for everything with tokens."""
    return {"x": 1, "residual": 1, "y": 1, "residual_out": 1}


def per_clip(case: Case) -> set[str]:
    """Return the tokens."""
    return {"x", "residual"}


def evaluate(call: Callable[..., Any], case: Case, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return y, and the new residual with prenorm (not in the `last` norm of a model)."""
    out = call(
        leaves["x"], leaves["weight"], leaves.get("bias"), residual=leaves.get("residual"),
        kind=case.option("kind", "rms"), prenorm=not case.has("last"), residual_in_fp32=not case.has("low"),
    )  # fmt: skip
    return {"y": out} if case.has("last") else {"y": out[0], "residual_out": out[1]}


def costly_checks(case: Case) -> set[str]:
    """Return `writes` for all cases, and at one odd size, with all options, `compile` and `device`."""
    if case.fits(B=2, L=9) and case.options == ("kind=layer", "low"):
        return {"writes", "compile", "device"}
    return {"writes"}


def expanded_axes() -> tuple[int, ...]:
    """Return batch and tokens. Along D the values of a row would be equal, and their slopes the rounding of a cancellation."""
    return 0, 1


def special_cases(check: str, grid: str) -> list[Case]:
    """Return cases for `strides`, and one NaN for `extremes`."""
    if check == "strides":
        options: list[tuple[str, ...]] = [("kind=rms", "for=strides"), ("kind=layer", "low", "for=strides")]
        small = cross("norm", [{"B": 3, "L": 19, "D": 75}], options, LOW_PRECISIONS[:2])
        huge = huge_case(check, "norm", CLIPS, {"B": 1, "L": 17, "D": 1008})
        return small if grid == "smoke" else [*small, huge]
    if check == "extremes":
        dtypes = LOW_PRECISIONS[:2] if grid == "smoke" else LOW_PRECISIONS
        words: list[tuple[str, ...]] = [("nan", "kind=rms", "for=extremes"), ("nan", "kind=layer", "for=extremes")]
        return cross("norm", [{"B": 2, "L": 9, "D": 33}], words, dtypes)
    return []


def races() -> list[Race]:
    """Return the race of RMS norms."""

    def points(grid: str) -> list[Point]:
        return race.operator_points("norm", grid, lambda B, E, L: {"B": B, "L": L, "D": E // 2})

    words, contenders = (lambda n: f"norm, {race.rows(n)}, width {n['D']:,}"), (("norm", ""),)
    return [Race("norm", order=4, points=points, contenders=contenders, options=("kind=rms",), title="the norm", words=words)]


def licence(dtype: str) -> tuple[str, ...]:
    """Return an odd width, and the widest model's."""
    return f"B2-L9-D33-kind=rms-{dtype}", f"B2-L1569-D576-kind=rms-{dtype}"


def bound(point: Point, variant: str, ceilings: Ceilings) -> float:
    """Return the seconds of the memory traffic."""
    return seconds(point.tokens, point["D"], element_bytes(point.dtype), point.mode == "train", ceilings)


def seconds(tokens: int, D: int, size: int, train: bool, ceilings: Ceilings) -> float:
    """Return the least seconds of a norm with elements of `size` bytes.

    Forward reads x and the float32 residual and writes y and the residual; backward reads dy, dresidual and the residual and
    writes dx and dresidual.
    """
    return tokens * D * (2 * size + 8 + (2 * size + 12 if train else 0)) / ceilings.copy
