"""The Mamba mixer, bidirectional or causal with state."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import fused
import reference
from fused.modules import mamba
from harness.fixtures import functional_modules as modules
from harness.judge.case import Case
from harness.judge.registry import Implementation, fused_implementations


def cases(grid: str) -> list[Case]:
    """Both kinds at the model's widths; `causal` ones with `state` are cut in the check `chunks`."""

    def shape(B: int, L: int, D: int) -> dict[str, int]:
        return {"B": B, "L": L, "D": D}

    tiny = [Case("mixer", tuple(shape(2, 3, 4).items()), o, "float64") for o in ((), ("causal", "state"))]
    small = [(shape(2, 1, 16), ()), (shape(2, 9, 32), ()), (shape(2, 9, 32), ("causal", "state"))]
    if grid == "smoke":
        return tiny + modules.precisions([*small, (shape(1, 65, 192), ())], "mixer", half=True)
    wide = [(shape(2, 197, 384), ()), (shape(2, 197, 384), ("causal", "state")), (shape(1, 1569, 576), ())]
    return tiny + modules.precisions([*small, *wide], "mixer", half=True)


@functools.lru_cache(maxsize=1)
def implementations() -> list[Implementation]:
    """`Mamba` of the reference and of `fused`, by backend."""

    def call_with(backend: str) -> Callable[..., Any]:
        return lambda *args, **options: fused.Mamba(*args, **options, backend=backend)

    return [Implementation("reference", reference.Mamba), *fused_implementations(mamba.BACKENDS, call_with, every_backend=True)]


def build(call: Callable[..., Any], case: Case) -> nn.Module:
    """The module of a case."""
    return call(case["D"], bimamba=not case.has("causal"))


def draw(case: Case, seed: int) -> dict[str, Tensor]:
    """Normed tokens, a trained model's parameters, and states if they are carried."""
    module = modules.on_meta(build, reference.Mamba, case)
    leaves = {"hidden": case.normal(seed, "hidden", case["B"], case["L"], case["D"])} | modules.parameters(module, case, seed)
    if case.has("state"):
        leaves["conv_state"] = case.normal(seed, "conv_state", case["B"], 2 * case["D"], 3)
        leaves["ssm_state"] = case.normal(seed, "ssm_state", case["B"], 2 * case["D"], 16)
    return leaves


def precise(case: Case) -> set[str]:
    """See `harness.fixtures.functional_modules.precise`; a conv state is in the tokens' dtype, an SSM state in float32."""
    names = modules.precise(case, modules.on_meta(build, reference.Mamba, case), {"hidden"}, {"ssm_state"})
    return names if case.has("cast", "autocast") else names | {"conv_state"}


def silent(case: Case) -> set[str]:
    """Every output has a cotangent."""
    return set()


def steps(case: Case) -> float:
    """Two scans, or one."""
    return case["L"] * (1 + case["B"] * case["D"] * 32 / 20000) * (1 if case.has("causal") else 2)


def time_axes(case: Case) -> dict[str, int]:
    """Tokens on axis 1."""
    return {"hidden": 1, "out": 1}


def evaluate(call: Callable[..., Any], case: Case, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """The mixed tokens, and the states that leave."""
    return chunked(call, case, leaves, (0,))


def chunked(call: Callable[..., Any], case: Case, leaves: dict[str, Tensor], cuts: tuple[int, ...]) -> dict[str, Tensor]:
    """Chunks chained by the state; the whole is one chunk."""
    module = modules.on_meta(build, call, case)
    if not case.has("state"):
        with modules.precision(case, leaves):
            return {"out": modules.call(module, leaves, lambda m, x: m(x), leaves["hidden"])}

    def step(start: int, stop: int, state: Any) -> Any:
        with modules.precision(case, leaves):
            part = leaves["hidden"][:, start:stop]
            return modules.call(module, leaves, lambda m, x, s: m(x, state=s, return_state=True), part, state)

    state = leaves["conv_state"], leaves["ssm_state"]
    outputs, state = modules.chained(step, cuts, case["L"], state)
    return {"out": torch.cat(outputs, dim=1), "conv_state": state[0], "ssm_state": state[1]}
