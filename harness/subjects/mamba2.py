"""The Mamba-2 mixer, causal with state and segments, or bidirectional."""

import functools
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn

import fused
import reference
from fused.modules import mamba2
from harness.baselines import autotuning
from harness.fixtures import functional_modules as modules
from harness.fixtures.chains import chain
from harness.judge.case import Case
from harness.judge.implementation import Implementation, fused_implementations
from harness.judge.race import Race, rows, timed_precision
from harness.records.ceilings import Ceilings, element_bytes
from harness.records.speed import Point
from harness.subjects import ssd

VAMBA = {"D": 3584, "P": 64, "N": 128}


def cases(grid: str) -> list[Case]:
    """Return small sizes with every option and, in `full`, wider ones; those with `state` are cut in the check `chunks`."""

    def shape(B: int, L: int, D: int, P: int, N: int) -> dict[str, int]:
        return {"B": B, "L": L, "D": D, "P": P, "N": N}

    every = [
        (), ("state",), ("segments", "state"), ("reverse",), ("groups=2", "norm-first", "channels"), ("no-norm", "mlp"),
    ]  # fmt: skip
    tiny = [Case("mamba2", tuple(shape(2, 3, 4, 4, 3).items()), o, "float64") for o in every[:5]]
    small = [(shape(2, 9, 16, 8, 16), o) for o in every] + [(shape(2, 1, 16, 8, 16), ("state",))]
    if grid == "smoke":
        few = [small[i] for i in (0, 2, 3, 4, 5)]
        return tiny[:4:2] + modules.in_precisions([*few, (shape(1, 70, 32, 16, 16), ())], "mamba2", half=False)
    wide = [(shape(2, 197, 384, 64, 64), o) for o in every[:4]] + [(shape(1, 785, 768, 64, 128), ())]
    return tiny + modules.in_precisions([*small, *wide], "mamba2", half=True)


@functools.lru_cache(maxsize=1)
def implementations() -> list[Implementation]:
    """Return `Mamba2` of the reference and of `fused`, by backend."""

    def call_with(backend: str) -> Callable[..., Any]:
        if backend.startswith("mamba_ssm"):
            autotuning.compile_in_threads()
        return lambda *args, **options: fused.Mamba2(*args, **options, backend=backend)

    backends = fused_implementations(mamba2.BACKENDS, call_with, every_backend=True)
    kept = [i for i in backends if i.backend != "native_kept"]  # the same as native here
    return [Implementation("reference", reference.Mamba2), *kept]


def build(call: Callable[..., Any], case: Case) -> nn.Module:
    """Return the module of a case."""
    D, P = case["D"], case["P"]
    return call(
        D, d_state=case["N"], headdim=P, ngroups=int(case.option("groups", "1")), bimamba=case.has("reverse"),
        norm_before_gate=case.has("norm-first"), D_has_hdim=case.has("channels"), rmsnorm=not case.has("no-norm"),
        d_ssm=2 * D - P if case.has("mlp") else None,
    )  # fmt: skip


def draw(case: Case, seed: int) -> dict[str, Tensor]:
    """Draw normed tokens, a trained model's parameters, and states if they are carried."""
    module: Any = modules.on_meta(build, reference.Mamba2, case)
    leaves = {"hidden": case.normal(seed, "hidden", case["B"], case["L"], case["D"])} | modules.parameters(module, case, seed)
    if case.has("state"):
        leaves["conv_state"] = case.normal(seed, "conv_state", case["B"], module.d_xBC, 3)
        leaves["ssm_state"] = case.normal(seed, "ssm_state", case["B"], *module.scan_shape)
    return leaves


def precise(case: Case) -> set[str]:
    """Return those of `functional_modules.precise`; a conv state is in the tokens' dtype, an SSM state in float32."""
    names = modules.precise(case, modules.on_meta(build, reference.Mamba2, case), {"hidden"}, {"ssm_state"})
    return names if case.has("cast", "autocast") else names | {"conv_state"}


def no_cotangent(case: Case) -> set[str]:
    """Return nothing: every output has a cotangent."""
    return set()


def output_values(case: Case) -> int:
    """Return the values of the mixed tokens."""
    return case["B"] * case["L"] * case["D"]


def steps(case: Case) -> float:
    """Return the steps of a scan, or of two."""
    return case["L"] * (1 + case["B"] * 2 * case["D"] * case["N"] / 20000) * (2 if case.has("reverse") else 1)


def time_axes(case: Case) -> dict[str, int]:
    """Return axis 1 for tokens."""
    return {"hidden": 1, "out": 1}


def edges(case: Case, backend: str, device: str) -> dict[str, Collection[int]]:
    """Return those of its scan."""
    sizes = {"B": case["B"], "L": case["L"], "H": 2 * case["D"] // case["P"]}
    return ssd.edges(Case("ssd", tuple(sizes.items())), backend, device)


def num_units(case: Case) -> int:
    """Return the tokens."""
    return case["L"]


def evaluate(call: Callable[..., Any], case: Case, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the mixed tokens, and the final states."""
    return chunked(call, case, leaves, (0,))


def chunked(call: Callable[..., Any], case: Case, leaves: dict[str, Tensor], cuts: tuple[int, ...]) -> dict[str, Tensor]:
    """Return the outputs of chunks chained by the state, zeros where a segment begins; without cuts, of one chunk."""
    module = modules.on_meta(build, call, case)
    whole = ssd.seq_idx(case, leaves["hidden"])
    if not case.has("state"):
        with modules.precision(case, leaves):
            return {"out": modules.call(module, leaves, lambda m, x: m(x, seq_idx=whole), leaves["hidden"])}

    def step(start: int, stop: int, state: Any) -> Any:
        if whole is not None and start and bool(whole[0, start - 1] != whole[0, start]):
            state = tuple(torch.zeros_like(s) for s in state)
        with modules.precision(case, leaves):
            part, ids = leaves["hidden"][:, start:stop], None if whole is None else whole[:, start:stop]
            return modules.call(module, leaves, lambda m, x, s: m(x, seq_idx=ids, state=s, return_state=True), part, state)

    outputs, state = chain(step, cuts, case["L"], (leaves["conv_state"], leaves["ssm_state"]))
    return {"out": torch.cat(outputs, dim=1), "conv_state": state[0], "ssm_state": state[1]}


def costly_checks(case: Case) -> set[str]:
    """Return `writes` for all cases, and at one odd size `compile` under autocast and `device` without."""
    if case.fits(B=2, L=9):
        return {"writes"} | {("autocast",): {"compile"}, (): {"device"}}.get(case.options, set())
    return {"writes"}


def races() -> list[Race]:
    """Return the race, at Vamba's sizes and at those of a small model."""

    def points(grid: str) -> list[Point]:
        sizes = [{"B": 1, "L": 785, "D": 192, "P": 64, "N": 64}] if grid == "cpu" else []
        if grid == "full":
            sizes = [{"B": 1, "L": L} | VAMBA for L in (9568, 38272, 76544, 153088)]
            sizes.append({"B": 8, "L": 1568} | VAMBA | {"D": 768})
        dtype = "float32" if grid == "cpu" else "bfloat16"
        return [Point("mamba2", tuple(s.items()), mode, dtype=dtype) for s in sizes for mode in ("infer", "train")]

    return [
        Race(
            "mamba2", order=7, points=points, contenders=(("mamba2", ""),), options=("cast",), runs=ssd.runs,
            title="the Mamba-2 mixer", words=lambda n: f"Mamba-2 mixer, {rows(n)}, width {n['D']:,}, {n['N']} states",
        )
    ]  # fmt: skip


def licence(dtype: str) -> tuple[str, ...]:
    """Return one case."""
    return (f"B2-L9-D16-P8-N16-{timed_precision(dtype)}",)


def bound(point: Point, variant: str, ceilings: Ceilings) -> float:
    """Return the least seconds of a mixer, its parts one after another: two products, convolution, scan and norm."""
    tokens, D, P, N, size = point.tokens, point["D"], point["P"], point["N"], element_bytes(point.dtype)
    E, H, train = 2 * D, 2 * D // P, point.mode == "train"
    operations = 2.0 * tokens * D * (2 * E + 2 * N + H + E) * (3 if train else 1)
    moved = tokens * size * (2 * (E + 2 * N) + 3 * E) * (2.5 if train else 1)
    return operations / ceilings.matmul + moved / ceilings.copy + ssd.seconds(tokens, H, P, N, size, train, ceilings)
