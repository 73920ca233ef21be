"""The scan of Mamba-2 (SSD), either direction, of one segment or several."""

import importlib
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

import reference
from fused.ops.ssd import api, eager
from harness.baselines import autotuning
from harness.fixtures.chains import chain
from harness.fixtures.functional_modules import delta_bias
from harness.instruments import symmetries
from harness.instruments.huge_tensors import CLIPS, huge_case
from harness.instruments.symmetries import Relation
from harness.judge.case import LOW_PRECISIONS, Case, cross
from harness.judge.implementation import Implementation, Sample, fused_implementations
from harness.judge.race import Race, rows
from harness.records.ceilings import Ceilings, element_bytes
from harness.records.speed import Entry, Point

TIME = {"x": 1, "dt": 1, "B": 1, "C": 1, "z": 1, "y": 1}
IDLE = {"dt": -1e4}  # softplus of it is 0 in every precision
HEADS = {"x": 2, "dt": 2, "A": 0, "D": 0, "z": 2, "dt_bias": 0, "y": 2, "initial_state": 1, "final_state": 1}
EXTREMES = ("dt=huge", "dt=tiny", "A=zero", "A=huge", "limits")
LIMITS = (0.02, 0.3)
Shape = dict[str, int]
VAMBA = {"H": 112, "P": 64, "N": 128}


def cases(grid: str) -> list[Case]:
    """Return odd sizes with every option and, in `full`, Vamba's heads and long rows."""

    def shape(B: int, L: int, H: int, P: int, N: int) -> Shape:
        return {"B": B, "L": L, "H": H, "P": P, "N": N}

    every = [
        (), ("reverse",), ("state",), ("segments", "state"), ("reverse", "segments", "state"), ("bare",),
        ("groups=2", "channels", "limits", "state"),
    ]  # fmt: skip
    some = [(), ("state",), ("reverse", "segments", "state")]
    if grid == "smoke":
        few = [(), *every[-3:]]
        return [
            *cross("ssd", [shape(2, 5, 2, 3, 2)], few[1:], ["float64"]),
            *cross("ssd", [shape(2, 1, 4, 3, 5)], some[1:2], LOW_PRECISIONS[:2]),
            *cross("ssd", [shape(3, 7, 4, 8, 16)], few, LOW_PRECISIONS[:2]),
            *cross("ssd", [shape(2, 130, 4, 16, 16)], [("reverse", "state")], LOW_PRECISIONS[:2]),
            *cross("ssd", [shape(1, 4099, 2, 8, 4)], [("infer",)], LOW_PRECISIONS[:2]),
        ]  # fmt: skip
    full = [
        *cross("ssd", [shape(2, 5, 2, 3, 2)], every, ["float64"]),
        *cross("ssd", [shape(2, 1, 4, 3, 5), shape(3, 7, 4, 8, 16)], every, LOW_PRECISIONS),
        *cross("ssd", [shape(2, 130, 6, 16, 16), shape(2, 333, 4, 64, 128)], every, LOW_PRECISIONS),
        *cross("ssd", [shape(1, 197, 3, 64, 96), shape(2, 65, 5, 24, 40), shape(1, 785, 112, 64, 128)], some, LOW_PRECISIONS),
        *cross("ssd", [shape(1, 4099, 2, 8, 4)], [("infer",)], LOW_PRECISIONS[:2]),
        *cross("ssd", [shape(1, 12545, 4, 64, 64)], [("infer",), ("reverse", "state")], LOW_PRECISIONS[:2]),
    ]  # fmt: skip
    if grid == "long":
        longest = [shape(1, 50177, 4, 64, 64), shape(1, 160000, 2, 64, 64)]
        full += cross("ssd", longest, [("infer", "state")], LOW_PRECISIONS[:2])
    return full


def implementations() -> list[Implementation]:
    """Return the reference, and `fused.ssd` by backend, looked up at the call so that a planted bug takes effect."""

    def call_with(backend: str) -> Callable[..., Any]:
        if backend.startswith("mamba_ssm"):
            autotuning.compile_in_threads()
        return lambda *args, **options: api.ssd(*args, **options, backend=backend)

    return [Implementation("reference", reference.ssd), *fused_implementations(api.BACKENDS, call_with, samples)]


def samples(case: Case, leaves: dict[str, Tensor]) -> list[Sample]:
    """Return the op that native registers."""
    importlib.import_module("fused.ops.ssd.native")
    names = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_state")
    tensors = [leaves.get(name) for name in names]
    options = (seq_idx(case, leaves["x"]), not case.has("bare"), *limits(case), case.has("reverse"), False, True)
    return [(torch.ops.videomamba.ssd.default, (*tensors, *options), {})]


def draw(case: Case, seed: int) -> dict[str, Tensor]:
    """Draw x, B and C as they leave conv and SiLU; half the heads remember hundreds of tokens, half a few.

    `extremes` changes every other head. "bare" has steps without bias and softplus, no D and no gate.
    """
    B, L, H, P, N, G = *(case[letter] for letter in "BLHPN"), int(case.option("groups", "1"))
    silu = torch.nn.functional.silu
    leaves = {
        "x": silu(case.normal(seed, "x", B, L, H, P)),
        "dt": 0.5 * case.normal(seed, "dt", B, L, H),
        "A": -(1 + torch.arange(H) % 16) * (0.1 * case.normal(seed, "A", H)).exp(),
        "B": case.normal(seed, "B", B, L, G, N),
        "C": case.normal(seed, "C", B, L, G, N),
    }
    if case.has("bare"):
        leaves["dt"] = case.log_uniform(seed, "dt", 1e-3, 0.7, B, L, H)
    else:
        leaves["D"] = 1 + 0.1 * case.normal(seed, "D", *((H, P) if case.has("channels") else (H,)))
        leaves["dt_bias"] = delta_bias(case, seed, "dt_bias", H)
    if not case.has("bare", "ungated"):
        leaves["z"] = case.normal(seed, "z", B, L, H, P)
    if case.has("state"):
        leaves["initial_state"] = case.normal(seed, "initial_state", B, H, P, N)
    return _extreme(case, leaves) if case.only_check == "extremes" else leaves


def _extreme(case: Case, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the leaves with every other head at the edge of what numbers can be."""
    odd = torch.arange(case["H"]) % 2 == 1
    if case.has("dt=huge", "dt=tiny"):
        leaves["dt"] = torch.where(odd, leaves["dt"] + (60 if case.has("dt=huge") else -40), leaves["dt"])
    if case.has("A=zero", "A=huge"):
        leaves["A"] = torch.where(odd, leaves["A"] * (1e-9 if case.has("A=zero") else 1e4), leaves["A"])
    return leaves


def precise(case: Case) -> set[str]:
    """Return the state; in low precision the parameters of a head are in the case's dtype, as in a module that was cast."""
    return {"initial_state"}


def no_cotangent(case: Case) -> set[str]:
    """Return the final state, unless a state is carried."""
    return set() if case.has("state") else {"final_state"}


def output_values(case: Case) -> int:
    """Return the values of y."""
    return case["B"] * case["L"] * case["H"] * case["P"]


def steps(case: Case) -> float:
    """Return one step a token, more expensive when wide."""
    return case["L"] * (1 + case["B"] * case["H"] * case["P"] * case["N"] / 20000)


def time_axes(case: Case) -> dict[str, int]:
    """Return axis 1 for everything with tokens."""
    return TIME


def edges(case: Case, backend: str, device: str) -> dict[str, Collection[int]]:
    """Return the chunks of the kernels or of PyTorch's operations, counted in the order of the scan."""
    size = 64 if backend == "native" else eager.chunk_length(case["B"], case["H"], case["L"])
    starts = range(0, case["L"], size)
    return {f"chunks of {size}": {0} | {case["L"] - s for s in starts if s} if case.has("reverse") else starts}


def num_units(case: Case) -> int:
    """Return the tokens."""
    return case["L"]


def per_clip(case: Case) -> set[str]:
    """Return tokens and states."""
    return {"x", "dt", "B", "C", "z", "initial_state"}


def seq_idx(case: Case, x: Tensor, start: int = 0) -> Tensor | None:
    """Return the segments of tokens from `start` on: ever longer ones, numbered from 2; None where there is but one."""
    if not case.has("segments"):
        return None
    tokens = torch.arange(start, start + x.shape[1], device=x.device, dtype=torch.float64)
    ids = (2 + (tokens + 0.5).sqrt().long()).expand(x.shape[0], -1)
    if getattr(x, "_dynamo_dynamic_indices", None):  # a check compiles with a batch that may change
        torch._dynamo.mark_dynamic(ids, 0)
    return ids


def limits(case: Case) -> tuple[float, float]:
    """Return the limits of the steps."""
    return LIMITS if case.has("limits") else (0.0, float("inf"))


def evaluate(
    call: Callable[..., Any], case: Case, leaves: dict[str, Tensor], start: int = 0
) -> dict[str, Tensor]:
    """Return y and the final state; the first token is number `start` of its row."""
    options: dict[str, Any] = {k: leaves[k] for k in ("D", "z", "dt_bias", "initial_state") if k in leaves}
    required = (leaves[k] for k in ("x", "dt", "A", "B", "C"))
    options |= {"softplus": not case.has("bare"), "reverse": case.has("reverse"), "dt_limit": limits(case)}
    y, final = call(*required, **options, seq_idx=seq_idx(case, leaves["x"], start))
    return {"y": y, "final_state": final}


def chunked(call: Callable[..., Any], case: Case, leaves: dict[str, Tensor], cuts: tuple[int, ...]) -> dict[str, Tensor]:
    """Return the outputs of chunks, each from the state that the one before left; zeros where a segment begins with it."""
    reverse = case.has("reverse")
    whole = seq_idx(case, leaves["x"])

    def step(start: int, stop: int, state: Tensor) -> tuple[Tensor, Tensor]:
        part = {k: v.narrow(TIME[k], start, stop - start) if k in TIME else v for k, v in leaves.items()}
        edge = stop if reverse else start
        if whole is not None and 0 < edge < case["L"] and bool(whole[0, edge - 1] != whole[0, edge]):
            state = torch.zeros_like(state)
        out = evaluate(call, case, part | {"initial_state": state}, start)
        return out["y"], out["final_state"]

    outputs, state = chain(step, cuts, case["L"], leaves["initial_state"], reverse)
    return {"y": torch.cat(outputs, dim=1), "final_state": state}


def channel_axes() -> dict[str, int]:
    """Return the axes of heads."""
    return HEADS


def costly_checks(case: Case) -> set[str]:
    """Return `writes` for all cases, and at one odd size `device` and, with all options, `compile`."""
    if case.fits(B=3, L=7):
        found = {(): {"device"}, ("reverse", "segments", "state"): {"device", "compile"}}
        return {"writes"} | found.get(case.options, set())
    return {"writes"}


def special_cases(check: str, grid: str) -> list[Case]:
    """Return cases for `strides`, with all that the operator has, for `extremes`, and for `invariants`."""
    odd = (("B", 2), ("L", 70), ("H", 4), ("P", 8), ("N", 16))
    if check == "strides":
        options = [(), ("segments", "state"), ("groups=2", "reverse", "state")]
        short = (("B", 2), ("L", 19), *odd[2:])
        small = [Case("ssd", short, (*o, "for=strides"), d) for o in options for d in LOW_PRECISIONS[:2]]
        clip = {"B": 1, "L": 17, "H": 63, "P": 16, "N": 16}
        return small if grid == "smoke" else [*small, huge_case(check, "ssd", CLIPS, clip | {"E": 63 * 16})]
    if check == "extremes":
        return [Case("ssd", odd, (o, "state", "for=extremes"), d) for o in EXTREMES for d in LOW_PRECISIONS[:2]]
    if check == "invariants":
        wide = [{"B": 1, "L": 785, "H": 12, "P": 64, "N": 128}] * (grid != "smoke")
        words: list[tuple[str, ...]] = [("state", "for=invariants"), ("groups=2", "reverse", "state", "for=invariants")]
        return cross("ssd", [dict(odd), *wide], words, LOW_PRECISIONS[:2])
    return []


def invariants(case: Case) -> dict[str, Relation]:
    """Return those of a recurrence that is linear in x and in the state, and stands still where a step is zero."""
    return symmetries.of_recurrence("x", IDLE, TIME, case["L"], per_clip(case))


def races() -> list[Race]:
    """Return the race, at Vamba's sizes and at those of a small model."""

    def points(grid: str) -> list[Point]:
        sizes = [{"B": 1, "L": 1569, "H": 12, "P": 64, "N": 64}] if grid == "cpu" else []
        if grid == "full":
            sizes = [{"B": 1, "L": L} | VAMBA for L in (9568, 38272, 76544, 153088)]
            sizes.append({"B": 8, "L": 1568, "H": 24, "P": 64, "N": 128})
        dtype = "float32" if grid == "cpu" else "bfloat16"
        return [Point("ssd", tuple(s.items()), mode, dtype=dtype) for s in sizes for mode in ("infer", "train")]

    return [
        Race(
            "ssd", order=6, points=points, contenders=(("ssd", ""),), options=("ungated",), runs=runs,
            title="the scan of Mamba-2",
            words=lambda n: f"scan of Mamba-2, {rows(n)}, {n['H']} heads of {n['P']}, {n['N']} states",
        )
    ]  # fmt: skip


def runs(entry: Entry, point: Point, grid: str) -> bool:
    """Return whether an entry is timed: PyTorch's operations, which take seconds on long rows, only on the shortest ones."""
    return grid == "cpu" or entry.implementation != "fused:torch" or point["L"] < 10_000


def licence(dtype: str) -> tuple[str, ...]:
    """Return one case in either direction, one of them with segments and a state."""
    return f"B3-L7-H4-P8-N16-{dtype}", f"B3-L7-H4-P8-N16-reverse-segments-state-{dtype}"


def bound(point: Point, variant: str, ceilings: Ceilings) -> float:
    """Return the seconds of one direction."""
    size, train = element_bytes(point.dtype), point.mode == "train"
    return seconds(point.tokens, point["H"], point["P"], point["N"], size, train, ceilings)


def seconds(tokens: int, H: int, P: int, N: int, size: int, train: bool, ceilings: Ceilings) -> float:
    """Return the least seconds of a scan with elements of `size` bytes: memory, products and exponentials overlap.

    The operations are those of the recurrence, 2 P N for the state and as many for y of a token and head, which no division
    into chunks undercuts. Forward reads x, dt, B and C and writes y, and has two exponentials a token and head, of step and
    decay. Backward reads them and dy and writes four gradients, with three times the products.
    """

    def slowest(moved: float, operations: float, exps: float) -> float:
        return tokens * max(moved / ceilings.copy, operations / ceilings.matmul, exps / ceilings.exp)

    forward = slowest((2 * H * P + H + 2 * N) * size, 4.0 * H * P * N, 2.0 * H)
    if not train:
        return forward
    return forward + slowest((3 * H * P + 2 * H + 4 * N) * size, 12.0 * H * P * N, 2.0 * H)
