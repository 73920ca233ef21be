"""Selective scan, either direction."""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import reference
from fused.ops.selective_scan import api
from harness.judge.case import Case, cross
from harness.judge.registry import Implementation, Sample, fused_implementations

EVERY = ["float32", "bfloat16", "float16"]
TIME = {"u": 1, "delta": 1, "B": 1, "C": 1, "z": 1, "y": 1}


def cases(grid: str) -> list[Case]:
    """Smoke: odd and short lengths, every option; full: the model's own lengths; both cross 12,545 tokens once."""

    def shape(B: int, L: int, E: int, N: int) -> dict[str, int]:
        return {"B": B, "L": L, "E": E, "N": N}

    plain, carried = [(), ("reverse",)], [("state",), ("reverse", "state")]
    rare = [("bare",), ("groups=2",), ("groups=2", "reverse", "state")]
    tiny = cross("scan", [shape(2, 3, 4, 3)], [*plain, *carried, *rare], ["float64"])
    odd = cross("scan", [shape(2, 1, 6, 4), shape(3, 7, 10, 16)], [*plain, *carried, *rare], EVERY)
    if grid == "smoke":
        return [
            *tiny, *odd,
            *cross("scan", [shape(2, 63, 24, 16)], [*plain, ("reverse", "state")], EVERY),
            *cross("scan", [shape(1, 197, 64, 16)], [("state",)], EVERY[:2]),
            *cross("scan", [shape(1, 12545, 6, 4)], [("infer",)], EVERY[:2]),
        ]  # fmt: skip
    full = [
        *tiny, *odd,
        *cross("scan", [shape(2, 63, 24, 1), shape(2, 33, 12, 40), shape(2, 65, 40, 64)], carried, EVERY),
        *cross("scan", [shape(2, 197, 384, 16)], [*plain, *carried, *rare], EVERY),
        *cross("scan", [shape(1, 1569, 1152, 16)], [(), ("reverse", "state")], EVERY),
        *cross("scan", [shape(1, 12545, 64, 16)], [("infer",), ("reverse", "state")], EVERY[:2]),  # the loop takes minutes
    ]  # fmt: skip
    if grid == "long":
        full += cross("scan", [shape(1, 50177, 64, 16), shape(1, 100353, 32, 16)], [("infer",), ("infer", "state")], EVERY)
    return full


def implementations() -> list[Implementation]:
    """The reference, and `fused.selective_scan` by backend, looked up at the call so that a planted bug is met."""

    def call_with(backend: str) -> Callable[..., Any]:
        return lambda *args, **options: api.selective_scan(*args, **options, backend=backend)

    return [Implementation("reference", reference.selective_scan), *fused_implementations(api.BACKENDS, call_with, samples)]


def samples(case: Case, leaves: dict[str, Tensor]) -> list[Sample]:
    """The op that native registers, where it runs as one call."""
    if case.has("groups=2"):
        return []
    importlib.import_module("fused.ops.selective_scan.native")
    names = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")
    options = not case.has("bare"), case.has("reverse"), False, True
    return [(torch.ops.videomamba.selective_scan.default, (*(leaves.get(k) for k in names), *options), {})]


def draw(case: Case, seed: int) -> dict[str, Tensor]:
    """u as it leaves conv and SiLU; half the channels remember hundreds of tokens (delta near 0.01), half a few (near 0.7)."""
    B, L, E, N, G = case["B"], case["L"], case["E"], case["N"], int(case.option("groups", "0"))
    group = (G,) if G else ()
    leaves = {
        "u": torch.nn.functional.silu(case.normal(seed, "u", B, L, E)),
        "delta": 0.5 * case.normal(seed, "delta", B, L, E),
        "A": -torch.arange(1, N + 1, dtype=torch.float64) * (0.1 * case.normal(seed, "A", E, N)).exp(),
        "B": case.normal(seed, "B", B, L, *group, N),
        "C": case.normal(seed, "C", B, L, *group, N),
    }
    if case.has("bare"):
        leaves["delta"] = case.log_uniform(seed, "delta", 1e-3, 0.7, B, L, E)
    else:
        leaves["D"] = 1 + 0.1 * case.normal(seed, "D", E)
        leaves["z"] = case.normal(seed, "z", B, L, E)
        leaves["delta_bias"] = delta_bias(case, seed, "delta_bias", E)
    if case.has("state"):
        leaves["initial_state"] = case.normal(seed, "initial_state", B, E, N)
    return leaves


def delta_bias(case: Case, seed: int, what: str, channels: int) -> Tensor:
    """Mamba's own range for every other channel, softplus(bias) in [1e-3, 0.1]; VideoMamba's initial 0 for the rest."""
    dt = case.log_uniform(seed, what, 1e-3, 0.1, channels)
    slow = dt + torch.log(-torch.expm1(-dt))
    return torch.where(torch.arange(channels) % 2 == 0, slow, 0.1 * case.normal(seed, what + " fast", channels))


def precise(case: Case) -> set[str]:
    """Parameters and states are float32 whatever the tokens are."""
    return {"A", "D", "delta_bias", "initial_state"}


def silent(case: Case) -> set[str]:
    """The final state has a cotangent where a state is carried."""
    return set() if case.has("state") else {"final_state"}


def steps(case: Case) -> float:
    """One step a token, dearer when wide."""
    return case["L"] * (1 + case["B"] * case["E"] * case["N"] / 20000)


def time_axes(case: Case) -> dict[str, int]:
    """Everything with tokens has them on axis 1."""
    return TIME


def clips(case: Case) -> set[str]:
    """Tokens and states have them."""
    return {"u", "delta", "B", "C", "z", "initial_state"}


def evaluate(call: Callable[..., Any], case: Case, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """y and the final state."""
    options = {k: leaves[k] for k in ("D", "z", "delta_bias", "initial_state") if k in leaves}
    required = (leaves[k] for k in ("u", "delta", "A", "B", "C"))
    y, final = call(*required, **options, softplus=not case.has("bare"), reverse=case.has("reverse"))
    return {"y": y, "final_state": final}


def chunked(call: Callable[..., Any], case: Case, leaves: dict[str, Tensor], cuts: tuple[int, ...]) -> dict[str, Tensor]:
    """Chunks in walking order, each from the state that the one before left."""
    return chain(lambda part: evaluate(call, case, part), case, leaves, cuts, TIME)


def chain(
    step: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    case: Case,
    leaves: dict[str, Tensor],
    cuts: tuple[int, ...],
    axes: dict[str, int],
) -> dict[str, Tensor]:
    """Run an operator with `initial_state`, `final_state` and y over chunks of its tokens."""
    edges = list(zip(cuts, (*cuts[1:], case["L"]), strict=True))
    walked, outputs = edges[::-1] if case.has("reverse") else edges, {}
    state = leaves["initial_state"]
    for start, stop in walked:
        part = {k: v.narrow(axes[k], start, stop - start) if k in axes else v for k, v in leaves.items()}
        out = step(part | {"initial_state": state})
        outputs[start], state = out["y"], out["final_state"]
    return {"y": torch.cat([outputs[start] for start, _ in edges], dim=1), "final_state": state}
