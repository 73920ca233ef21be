"""The Mamba mixer, bidirectional or causal with state."""

import functools
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

import fused
import reference
from fused.modules import mamba
from harness.fixtures import functional_modules as modules
from harness.fixtures import state_passes
from harness.fixtures.chains import chain
from harness.instruments import symmetries
from harness.instruments.symmetries import Relation
from harness.judge import race
from harness.judge.case import Case, cross
from harness.judge.implementation import Implementation, fused_implementations
from harness.judge.race import Race, timed_precision
from harness.records.ceilings import Ceilings, element_bytes
from harness.records.speed import Point
from harness.subjects import scan

KINDS = ("fresh", modules.LONG_MEMORY, state_passes.WORST_CASE, state_passes.RESCAN)  # of inputs
MOMENTS = {"B": 1, "L": 8209, "D": 256}  # the least tokens, and a part of a tile, of state passes by moments


def cases(grid: str) -> list[Case]:
    """Return both kinds at the model's widths; `causal` ones with `state` are cut in the check `chunks`."""

    def shape(B: int, L: int, D: int) -> dict[str, int]:
        return {"B": B, "L": L, "D": D}

    tiny = [Case("mixer", tuple(shape(2, 3, 4).items()), o, "float64") for o in ((), ("causal", "state"))]
    small = [(shape(2, 1, 16), ()), (shape(2, 9, 32), ()), (shape(2, 9, 32), ("causal", "state"))]
    if grid == "smoke":
        return tiny + modules.in_precisions([*small, (shape(1, 65, 192), ())], "mixer", half=True)
    # inference in which the native scan is split; the longer ones have state passes by moments
    kinds: list[tuple[str, ...]] = [(kind, "infer", "cast") for kind in KINDS]
    split = cross("mixer", [shape(1, 1569, 576)], kinds[:2], ["bfloat16"]) + cross("mixer", [MOMENTS], kinds, ["bfloat16"])
    wide = [(shape(2, 197, 384), ()), (shape(2, 197, 384), ("causal", "state")), (shape(1, 1569, 576), ())]
    return tiny + split + modules.in_precisions([*small, *wide], "mixer", half=True)


@functools.lru_cache(maxsize=1)
def implementations() -> list[Implementation]:
    """Return `Mamba` of the reference and of `fused`, by backend."""

    def call_with(backend: str) -> Callable[..., Any]:
        return lambda *args, **options: fused.Mamba(*args, **options, backend=backend)

    return [Implementation("reference", reference.Mamba), *fused_implementations(mamba.BACKENDS, call_with, every_backend=True)]


def build(call: Callable[..., Any], case: Case) -> nn.Module:
    """Return the module of a case."""
    return call(case["D"], bimamba=not case.has("causal"))


def draw(case: Case, seed: int) -> dict[str, Tensor]:
    """Draw normed tokens, a trained model's parameters, and states if they are carried."""
    module = modules.on_meta(build, reference.Mamba, case)
    leaves = {"hidden": case.normal(seed, "hidden", case["B"], case["L"], case["D"])} | modules.parameters(module, case, seed)
    if case.has("state"):
        leaves["conv_state"] = case.normal(seed, "conv_state", case["B"], 2 * case["D"], 3)
        leaves["ssm_state"] = case.normal(seed, "ssm_state", case["B"], 2 * case["D"], 16)
    return state_passes.drawn(case, leaves)


def precise(case: Case) -> set[str]:
    """Return those of `functional_modules.precise`; a conv state is in the tokens' dtype, an SSM state in float32."""
    names = modules.precise(case, modules.on_meta(build, reference.Mamba, case), {"hidden"}, {"ssm_state"})
    return names if case.has("cast", "autocast") else names | {"conv_state"}


def no_cotangent(case: Case) -> set[str]:
    """Return nothing: every output has a cotangent."""
    return set()


def output_values(case: Case) -> int:
    """Return the values of the mixed tokens."""
    return case["B"] * case["L"] * case["D"]


def steps(case: Case) -> float:
    """Return the steps of two scans, or of one."""
    return case["L"] * (1 + case["B"] * case["D"] * 32 / 20000) * (1 if case.has("causal") else 2)


def time_axes(case: Case) -> dict[str, int]:
    """Return axis 1 for tokens."""
    return {"hidden": 1, "out": 1}


def edges(case: Case, backend: str, device: str) -> dict[str, Collection[int]]:
    """Return those of its scans."""
    sizes = {"B": case["B"], "L": case["L"], "E": 2 * case["D"], "N": 16}
    return scan.edges(Case("scan", tuple(sizes.items())), backend, device, directions=1 if case.has("causal") else 2)


def num_units(case: Case) -> int:
    """Return the tokens."""
    return case["L"]


def evaluate(call: Callable[..., Any], case: Case, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the mixed tokens, and the final states."""
    return chunked(call, case, leaves, (0,))


def chunked(call: Callable[..., Any], case: Case, leaves: dict[str, Tensor], cuts: tuple[int, ...]) -> dict[str, Tensor]:
    """Return the outputs of chunks chained by the state; without cuts, of one chunk."""
    module = modules.on_meta(build, call, case)
    if not case.has("state"):
        with modules.precision(case, leaves):
            return {"out": modules.call(module, leaves, lambda m, x: m(x), leaves["hidden"])}

    def step(start: int, stop: int, state: Any) -> Any:
        with modules.precision(case, leaves):
            part = leaves["hidden"][:, start:stop]
            return modules.call(module, leaves, lambda m, x, s: m(x, state=s, return_state=True), part, state)

    state = leaves["conv_state"], leaves["ssm_state"]
    outputs, state = chain(step, cuts, case["L"], state)
    return {"out": torch.cat(outputs, dim=1), "conv_state": state[0], "ssm_state": state[1]}


def special_cases(check: str, grid: str) -> list[Case]:
    """Return cases for `invariants`, of both kinds."""
    if check != "invariants":
        return []
    sizes = [{"B": 2, "L": 21, "D": 16}] + [{"B": 2, "L": 785, "D": 192}] * (grid != "smoke")
    kinds: list[tuple[str, ...]] = [("for=invariants",), ("causal", "state", "for=invariants")]
    return cross("mixer", sizes, kinds, ["float32"])


def invariants(case: Case) -> dict[str, Relation]:
    """Return that clips are independent; of two directions, that they may be exchanged; of one, that it can be cut."""
    found = {"permutation": symmetries.permutation({"hidden", "conv_state", "ssm_state"})}
    if case.has("causal"):
        return found | {"concatenation": symmetries.concatenation(case["L"])}
    return found | {"reversal": symmetries.reversal(time_axes(case), exchange)}


def exchange(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the leaves with the weights of one direction in the places of the other's."""
    found = dict(leaves)
    for name in leaves:
        module, dot, rest = name.partition(".")
        other = module.replace("_b_log", "_log") if module.endswith("_b_log") else module.removesuffix("_b")
        if other != module:
            found |= {name: leaves[other + dot + rest], other + dot + rest: leaves[name]}
    return found


def costly_checks(case: Case) -> set[str]:
    """Return `writes` for all cases, and at one odd size `compile` under autocast and `device` without."""
    if case.fits(B=2, L=9):
        return {"writes"} | {("autocast",): {"compile"}, (): {"device"}}.get(case.options, set())
    return {"writes"}


def races() -> list[Race]:
    """Return the race of bidirectional mixers.

    Four more have inputs of the kinds on which the time of inference depends: those that forget fast, those that remember, the
    worst case, which state passes must read whole and token by token, and one in which a sequence is scanned again.
    """

    def sizes(B: int, E: int, L: int) -> dict[str, int]:
        return {"B": B, "L": L, "D": E // 2}

    mixers = Race(
        "mixer", order=5, points=lambda grid: race.operator_points("mixer", grid, sizes), contenders=(("mixer", ""),),
        options=("cast",), title="the Mamba mixer", words=lambda n: f"Mamba mixer, {race.rows(n)}, width {n['D']:,}",
    )  # fmt: skip

    def of_kind(option: str) -> Race:
        name, dims = f"mixer-{option}", tuple(sizes(1, 1152, 9409).items())
        licensed = lambda dtype: (f"B1-L8209-D256-{option}-infer-cast-{dtype}",)  # noqa: E731
        points = lambda grid: [Point(name, dims, "infer", way) for way in ("eager", "graph") if grid == "full"]  # noqa: E731
        variant = option.replace("-", " ")
        return replace(mixers, name=name, points=points, licence=licensed, options=(option, "cast"), variant=variant)

    return [mixers, *map(of_kind, KINDS)]


def licence(dtype: str) -> tuple[str, ...]:
    """Return one case."""
    return (f"B2-L197-D384-{timed_precision(dtype)}",)


def bound(point: Point, variant: str, ceilings: Ceilings) -> float:
    """Return the seconds of a bidirectional mixer."""
    return seconds(point.tokens, point["D"], element_bytes(point.dtype), point.mode == "train", ceilings)


def seconds(tokens: int, D: int, size: int, train: bool, ceilings: Ceilings, directions: int = 2) -> float:
    """Return the least seconds of a mixer with elements of `size` bytes, its parts one after another.

    The parts are in_proj, then for each direction conv, x_proj, dt_proj and scan, then out_proj; a backward is two matmuls for
    each.
    """
    E, N, R = 2 * D, 16, -(-D // 16)
    operations = 2 * tokens * (D * 2 * E + E * D + directions * (E * (R + 2 * N) + R * E)) * (3 if train else 1)
    conv = tokens * E * size * (1 + directions) * (2 if train else 1) / ceilings.copy  # all directions share one reading of x
    return operations / ceilings.matmul + conv + directions * scan.seconds(tokens, E, N, size, train, ceilings)
