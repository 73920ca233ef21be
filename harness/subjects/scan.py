"""Selective scan, either direction."""

import importlib
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

import reference
from fused.ops.selective_scan import api, schedule
from fused.ops.selective_scan.recurrence import make_segments
from harness.fixtures import extreme_scan
from harness.fixtures.chains import chain_operator
from harness.fixtures.functional_modules import delta_bias
from harness.instruments import symmetries
from harness.instruments.huge_tensors import CLIPS, PERIODS, huge_case
from harness.instruments.symmetries import Relation
from harness.judge import race
from harness.judge.case import LOW_PRECISIONS, Case, cross
from harness.judge.implementation import Implementation, Sample, fused_implementations
from harness.judge.layout_adapters import scan_from_mamba_ssm
from harness.judge.race import Race
from harness.records.ceilings import Ceilings, element_bytes
from harness.records.speed import Point

LAYOUTS = {"mamba_ssm": scan_from_mamba_ssm}
FORGETTING = 2000  # added to delta, it makes exp(delta A) 0 in float64 too
TIME = {"u": 1, "delta": 1, "B": 1, "C": 1, "z": 1, "y": 1}
IDLE = {"delta": -1e4}  # softplus of it is 0 in every precision


def cases(grid: str) -> list[Case]:
    """Return odd and short lengths with every option and, in `full`, the model's own lengths; both cross 12,545 tokens once."""

    def shape(B: int, L: int, E: int, N: int) -> dict[str, int]:
        return {"B": B, "L": L, "E": E, "N": N}

    plain, carried = [(), ("reverse",)], [("state",), ("reverse", "state")]
    rare = [("bare",), ("groups=2",), ("groups=2", "reverse", "state")]
    tiny = cross("scan", [shape(2, 3, 4, 3)], [*plain, *carried, *rare], ["float64"])
    odd = cross("scan", [shape(2, 1, 6, 4), shape(3, 7, 10, 16)], [*plain, *carried, *rare], LOW_PRECISIONS)
    if grid == "smoke":
        return [
            *tiny, *odd,
            *cross("scan", [shape(2, 63, 24, 16)], [*plain, ("reverse", "state")], LOW_PRECISIONS),
            *cross("scan", [shape(1, 197, 64, 16)], [("state",)], LOW_PRECISIONS[:2]),
            *cross("scan", [shape(1, 12545, 6, 4)], [("infer",)], LOW_PRECISIONS[:2]),
        ]  # fmt: skip
    full = [
        *tiny, *odd,
        *cross("scan", [shape(2, 63, 24, 1), shape(2, 33, 12, 40), shape(2, 65, 40, 64)], carried, LOW_PRECISIONS),
        *cross("scan", [shape(2, 197, 384, 16)], [*plain, *carried, *rare], LOW_PRECISIONS),
        *cross("scan", [shape(1, 1569, 1152, 16)], [(), ("reverse", "state")], LOW_PRECISIONS),
        # the loop takes minutes
        *cross("scan", [shape(1, 12545, 64, 16)], [("infer",), ("reverse", "state")], LOW_PRECISIONS[:2]),
    ]  # fmt: skip
    if grid == "long":
        longest = [shape(1, 50177, 64, 16), shape(1, 100353, 32, 16)]
        full += cross("scan", longest, [("infer",), ("infer", "state")], LOW_PRECISIONS)
    return full


def implementations() -> list[Implementation]:
    """Return the reference, and `fused.selective_scan` by backend, looked up at the call so that a planted bug takes effect."""

    def call_with(backend: str) -> Callable[..., Any]:
        return lambda *args, **options: api.selective_scan(*args, **options, backend=backend)

    fused = fused_implementations(api.BACKENDS, call_with, samples, cpu_samples=cpu_samples)
    return [Implementation("reference", reference.selective_scan), *fused]


def samples(case: Case, leaves: dict[str, Tensor]) -> list[Sample]:
    """Return the op that native registers, where it runs as one call."""
    if case.has("groups=2"):
        return []
    importlib.import_module("fused.ops.selective_scan.native")
    pairs = ([leaves.get(name)] for name in ("u", "delta", "A", "B", "C", "D", "delta_bias"))  # lists: an entry a direction
    options = not case.has("bare"), [case.has("reverse")], False, True
    arguments = (*pairs, leaves.get("z"), leaves.get("initial_state"), *options)
    return [(torch.ops.videomamba.selective_scan.default, arguments, {})]


def cpu_samples(case: Case, leaves: dict[str, Tensor]) -> list[Sample]:
    """Return the op that the kernels for CPUs register, in the dtype that they compute in."""
    importlib.import_module("fused.ops.selective_scan.cpu")
    precise = {k: x.to(torch.promote_types(x.dtype, torch.float32)) for k, x in leaves.items()}
    pairs = ([precise.get(name)] for name in ("u", "delta", "A", "B", "C", "D", "delta_bias"))
    options = not case.has("bare"), [case.has("reverse")], True
    arguments = (*pairs, precise.get("z"), precise.get("initial_state"), *options)
    return [(torch.ops.videomamba.selective_scan_cpu.default, arguments, {})]


def draw(case: Case, seed: int) -> dict[str, Tensor]:
    """Draw u as it leaves conv and SiLU; half the channels remember hundreds of tokens (delta near 0.01), half a few (0.7).

    `extremes` changes every other channel. Of a clip that is repeated along the tokens, delta and z are the same at every
    token, and no token remembers another.
    """
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
    if case.option(PERIODS, ""):
        constant = {k: leaves[k][:, :1].expand_as(leaves["u"]) for k in ("delta", "z")}
        leaves |= constant | {"delta": constant["delta"] + FORGETTING, "C": leaves["C"] / FORGETTING}
    return extreme_scan.extreme(case, seed, leaves) if case.only_check == "extremes" else leaves


def precise(case: Case) -> set[str]:
    """Return parameters and states."""
    return {"A", "D", "delta_bias", "initial_state"}


def no_cotangent(case: Case) -> set[str]:
    """Return the final state, unless a state is carried."""
    return set() if case.has("state") else {"final_state"}


def output_values(case: Case) -> int:
    """Return the values of y."""
    return case["B"] * case["L"] * case["E"]


def steps(case: Case) -> float:
    """Return one step a token, more expensive when wide."""
    return case["L"] * (1 + case["B"] * case["E"] * case["N"] / 20000)


def time_axes(case: Case) -> dict[str, int]:
    """Return axis 1 for everything with tokens."""
    return TIME


def edges(case: Case, backend: str, device: str, directions: int = 1) -> dict[str, Collection[int]]:
    """Return the tiles of the native kernels and, on a GPU, their splits; the segments and splits of PyTorch's operations."""
    B, L, E, N = (case[letter] for letter in "BLEN")
    if backend.startswith("native"):
        found: dict[str, Collection[int]] = {f"tiles of {schedule.TILE}": range(0, L, schedule.TILE)}
        if device.startswith("cuda"):
            plan = schedule.make_schedule(B, L, E, N, directions, schedule.multiprocessors(torch.device(device)))
            for which, splits in (("forward", plan.fwd_schedule), ("backward", plan.bwd_schedule)):
                size = splits.tiles_per_split * schedule.TILE
                found |= {f"splits of {size} of the {which} kernel": range(0, L, size)} if splits.num_splits > 1 else {}
        return found
    if backend == "torch":
        _, segments = make_segments(B, L, directions * E * N, device.startswith("cuda"))
        starts = {s.start + i * ((s.stop - s.start) // s.num_splits) for s in segments for i in range(s.num_splits)}
        found = {"segments": {s.start for s in segments}, "splits of segments": starts}
        if case.has("reverse"):  # they are counted from the last token
            found = {name: {0} | {L - place for place in places if place} for name, places in found.items()}
        return found
    return {}


def num_units(case: Case) -> int:
    """Return the tokens."""
    return case["L"]


def per_clip(case: Case) -> set[str]:
    """Return tokens and states."""
    return {"u", "delta", "B", "C", "z", "initial_state"}


def evaluate(call: Callable[..., Any], case: Case, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return y and the final state."""
    options = {k: leaves[k] for k in ("D", "z", "delta_bias", "initial_state") if k in leaves}
    required = (leaves[k] for k in ("u", "delta", "A", "B", "C"))
    y, final = call(*required, **options, softplus=not case.has("bare"), reverse=case.has("reverse"))
    return {"y": y, "final_state": final}


def chunked(call: Callable[..., Any], case: Case, leaves: dict[str, Tensor], cuts: tuple[int, ...]) -> dict[str, Tensor]:
    """Return the outputs of chunks in the direction's order, each from the state that the one before left."""
    return chain_operator(lambda part: evaluate(call, case, part), leaves, cuts, case["L"], TIME, case.has("reverse"))


def repeat(leaves: dict[str, Tensor], count: int) -> dict[str, Tensor]:
    """Return the leaves of `count` periods: u, B and C repeated, delta and z expanded."""
    long = {k: leaves[k].repeat(1, count, 1) for k in ("u", "B", "C")}
    return leaves | long | {k: leaves[k][:, :1].expand_as(long["u"]) for k in ("delta", "z")}


def channel_axes() -> dict[str, int]:
    """Return the axes of channels."""
    return extreme_scan.CHANNELS


def costly_checks(case: Case) -> set[str]:
    """Return `writes` for all cases, and at one odd size `device` and, with all options, `compile`."""
    if case.fits(B=3, L=7):
        return {"writes"} | {(): {"device"}, ("reverse", "state"): {"device", "compile"}}.get(case.options, set())
    return {"writes"}


def special_cases(check: str, grid: str) -> list[Case]:
    """Return cases for `strides`, with all that the operator has, for `invariants`, and for `extremes`."""
    if check == "strides":
        wide = [((), 16), (("reverse", "state"), 16), (("groups=2", "reverse", "state"), 5)]
        small = [
            Case("scan", (("B", 3), ("L", 19), ("E", 74), ("N", N)), (*options, "for=strides"), dtype)
            for options, N in wide
            for dtype in LOW_PRECISIONS[:2]
        ]
        clip = {"B": 1, "L": 17, "E": 1008, "N": 1}
        huge = [
            huge_case(check, "scan", CLIPS, clip), huge_case(check, "scan", CLIPS, clip, "reverse"),
            huge_case(check, "scan", PERIODS, clip | {"E": 16000}, "infer"),
        ]  # fmt: skip
        return small if grid == "smoke" else small + huge
    if check == "invariants":
        sizes = [{"B": 2, "L": 21, "E": 12, "N": 4}] + [{"B": 1, "L": 1569, "E": 384, "N": 16}] * (grid != "smoke")
        every = [("state",), ("reverse", "state"), ("groups=2", "state")]
        return cross("scan", sizes, [(*o, "for=invariants") for o in every], LOW_PRECISIONS[:2])
    return extreme_scan.cases(grid) if check == "extremes" else []


def invariants(case: Case) -> dict[str, Relation]:
    """Return those of a recurrence that is linear in u and in the state, and stands still where a step is zero."""
    return symmetries.of_recurrence("u", IDLE, TIME, case["L"], per_clip(case))


def races() -> list[Race]:
    """Return the race of one direction; in grid `full` the narrow shape is left to both directions."""

    def points(grid: str) -> list[Point]:
        return race.operator_points("scan", grid, timed_sizes, full=race.FULL_SHAPES[1:])

    return [
        Race(
            "scan", order=1, points=points, contenders=(("scan", ""),), channels_first=("fused:mamba_ssm",), title="the scan",
            words=lambda n: f"scan, {race.rows(n)}, {n['E']:,} channels",
        )
    ]  # fmt: skip


def timed_sizes(B: int, E: int, L: int) -> dict[str, int]:
    """Return the sizes of a timed point: 16 states."""
    return {"B": B, "L": L, "E": E, "N": 16}


def licence(dtype: str) -> tuple[str, ...]:
    """Return one case in either direction."""
    return f"B2-L197-E384-N16-{dtype}", f"B2-L197-E384-N16-reverse-{dtype}"


def bound(point: Point, variant: str, ceilings: Ceilings) -> float:
    """Return the seconds of one direction."""
    return seconds(point.tokens, point["E"], point["N"], element_bytes(point.dtype), point.mode == "train", ceilings)


def seconds(tokens: int, E: int, N: int, size: int, train: bool, ceilings: Ceilings) -> float:
    """Return the least seconds of a scan with elements of `size` bytes: memory, exponentials and instructions overlap.

    Forward reads u, delta, z, B and C and writes y: N + 4 exponentials and 5 N + 30 instructions an element. Backward reads
    them and dy and writes five gradients, with states from checkpoints every 16 tokens, in 13 to 14 N instructions.
    Exponentials are not replaced by polynomials.
    """

    def slowest(moved: float, exps: float, issued: float) -> float:
        each = moved / ceilings.copy, exps / ceilings.exp, issued / ceilings.issue
        return tokens * E * max(each)

    forward = slowest(4 * size + 2 * N * size / E, N + 4, 5 * N + 30)
    if not train:
        return forward
    return forward + slowest(7 * size + 4 * N / 16 + 16 * N / E + 8 * 2 * N / 64, N + 5, 12.5 * N + 59)
