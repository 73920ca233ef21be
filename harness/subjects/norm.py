"""Add and normalise, RMS and LayerNorm."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import reference
from fused.ops.add_norm import api
from harness.judge.case import Case, cross
from harness.judge.registry import Implementation, Sample, fused_implementations
from harness.subjects.scan import EVERY


def cases(grid: str) -> list[Case]:
    """Both kinds, with and without a residual, prenorm or not, residual in float32 or in x's dtype."""

    def shape(B: int, L: int, D: int) -> dict[str, int]:
        return {"B": B, "L": L, "D": D}

    options: list[tuple[str, ...]] = [
        (f"kind={kind}", *rest) for kind in ("rms", "layer") for rest in ((), ("first",), ("last",), ("low",), ("low", "first"))
    ]
    small = [
        *cross("norm", [shape(2, 3, 8)], options, ["float64"]),
        *cross("norm", [shape(1, 1, 32), shape(2, 9, 33)], options, EVERY),
    ]
    if grid == "smoke":
        return [*small, *cross("norm", [shape(1, 197, 192)], options[::5], EVERY)]
    return [
        *small,
        *cross("norm", [shape(2, 1569, 576)], options, EVERY),
        *cross("norm", [shape(1, 12545, 192)], options[:1], EVERY),
    ]


def implementations() -> list[Implementation]:
    """The reference, and `fused.add_norm` by backend."""

    def call_with(backend: str) -> Callable[..., Any]:
        return lambda *args, **options: api.add_norm(*args, **options, backend=backend)

    return [Implementation("reference", reference.add_norm), *fused_implementations(api.BACKENDS, call_with, samples)]


def samples(case: Case, leaves: dict[str, Tensor]) -> list[Sample]:
    """The op that native registers; it stores the residual unrounded."""
    tensors = (leaves.get(k) for k in ("x", "weight", "bias", "residual"))
    return [(torch.ops.videomamba.add_norm.default, (*tensors, 1e-5, case.option("kind", "rms") == "layer", torch.float32), {})]


def draw(case: Case, seed: int) -> dict[str, Tensor]:
    """A residual stream three times as large as what is added, with a mean that LayerNorm must remove."""
    B, L, D = case["B"], case["L"], case["D"]
    leaves = {"x": case.normal(seed, "x", B, L, D), "weight": 1 + 0.1 * case.normal(seed, "weight", D)}
    if case.option("kind", "rms") == "layer":
        leaves["bias"] = 0.1 * case.normal(seed, "bias", D)
    if not case.has("first"):
        leaves["residual"] = 3 * case.normal(seed, "residual", B, L, D) + 1
    return leaves


def precise(case: Case) -> set[str]:
    """Weights are float32; so is the residual, unless it is `low`."""
    return {"weight", "bias"} | (set() if case.has("low") else {"residual"})


def silent(case: Case) -> set[str]:
    """Every output has a cotangent."""
    return set()


def steps(case: Case) -> float:
    """No sequential steps, some memory traffic."""
    return 1 + case["B"] * case["L"] * case["D"] / 1e6


def clips(case: Case) -> set[str]:
    """Tokens have them."""
    return {"x", "residual"}


def evaluate(call: Callable[..., Any], case: Case, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """y, and the new residual with prenorm (not in the `last` norm of a model)."""
    out = call(
        leaves["x"], leaves["weight"], leaves.get("bias"), residual=leaves.get("residual"),
        kind=case.option("kind", "rms"), prenorm=not case.has("last"), residual_in_fp32=not case.has("low"),
    )  # fmt: skip
    return {"y": out} if case.has("last") else {"y": out[0], "residual_out": out[1]}
