"""Selective scan in both directions over the same tokens, under one gate."""

from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

from torch import Tensor

import reference
from fused.ops.selective_scan import api as scan_api
from harness.fixtures.functional_modules import LONG_MEMORY
from harness.instruments import symmetries
from harness.instruments.symmetries import Relation
from harness.judge import race
from harness.judge.case import LOW_PRECISIONS, Case, cross
from harness.judge.implementation import Implementation, fused_implementations
from harness.judge.race import Race
from harness.records.ceilings import Ceilings
from harness.records.speed import Point
from harness.subjects import scan

PAIRED = ("u", "delta", "A", "B", "C", "D", "delta_bias")
BACKWARD = "_b"  # suffix of the backward direction's tensors


def cases(grid: str) -> list[Case]:
    """Return odd and short lengths, on either side of a tile and of where the directions meet; in `full` the model's own."""

    def shape(B: int, L: int, E: int, N: int) -> dict[str, int]:
        return {"B": B, "L": L, "E": E, "N": N}

    tiny = cross("scan_both", [shape(2, 3, 4, 3)], [(), ("bare",)], ["float64"])
    odd = cross("scan_both", [shape(2, 1, 6, 4), shape(3, 17, 10, 16)], [(), ("bare",)], LOW_PRECISIONS)
    if grid == "smoke":
        return [*tiny, *odd, *cross("scan_both", [shape(2, 63, 24, 16)], [()], LOW_PRECISIONS[:2])]
    return [
        *tiny, *odd,
        *cross("scan_both", [shape(2, 65, 40, 64), shape(2, 197, 384, 16)], [(), ("bare",)], LOW_PRECISIONS),
        *cross("scan_both", [shape(1, 1569, 1152, 16)], [()], LOW_PRECISIONS),
        *cross("scan_both", [shape(2, 197, 384, 16)], [("fresh",), (LONG_MEMORY,)], LOW_PRECISIONS[:2]),
        *cross("scan_both", [shape(1, 12545, 64, 16)], [()], LOW_PRECISIONS[:2]),  # the loop takes minutes
    ]  # fmt: skip


def implementations() -> list[Implementation]:
    """Return two scans of the reference, and `fused.bidirectional_scan` by backend."""

    def two(pairs: dict[str, tuple], z: Tensor | None, softplus: bool) -> Tensor:
        first, second = ({k: v[i] for k, v in pairs.items()} | {"z": z, "softplus": softplus} for i in range(2))
        return reference.selective_scan(**first)[0] + reference.selective_scan(**second, reverse=True)[0]

    def call_with(backend: str) -> Callable[..., Any]:
        return lambda pairs, z, softplus: scan_api.bidirectional_scan(**pairs, z=z, softplus=softplus, backend=backend)

    return [Implementation("reference", two), *fused_implementations(scan_api.BACKENDS, call_with)]


def draw(case: Case, seed: int) -> dict[str, Tensor]:
    """Draw the leaves of `scan` twice, with one z."""
    first, second = scan.draw(case, seed), scan.draw(case, seed + 10_000)
    return first | {k + BACKWARD: v for k, v in second.items() if k in PAIRED}


def precise(case: Case) -> set[str]:
    """Return those of `scan`, for both directions."""
    names = scan.precise(case)
    return names | {name + BACKWARD for name in names}


def no_cotangent(case: Case) -> set[str]:
    """Return nothing: there is one output."""
    return set()


def output_values(case: Case) -> int:
    """Return the values of y."""
    return scan.output_values(case)


def steps(case: Case) -> float:
    """Return the steps of two scans."""
    return 2 * scan.steps(case)


def time_axes(case: Case) -> dict[str, int]:
    """Return axis 1 for everything with tokens."""
    return scan.TIME | {name + BACKWARD: axis for name, axis in scan.TIME.items() if name in PAIRED}


def edges(case: Case, backend: str, device: str) -> dict[str, Collection[int]]:
    """Return those of a scan in both directions."""
    return scan.edges(case, backend, device, directions=2)


def evaluate(call: Callable[..., Any], case: Case, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return y."""
    pairs = {k: (leaves[k], leaves[k + BACKWARD]) for k in PAIRED if k in leaves}
    return {"y": call(pairs, leaves.get("z"), not case.has("bare"))}


def special_cases(check: str, grid: str) -> list[Case]:
    """Return cases for `invariants`, odd and in `full` of the model's size."""
    if check != "invariants":
        return []
    sizes = [{"B": 2, "L": 21, "E": 12, "N": 4}] + [{"B": 1, "L": 1569, "E": 384, "N": 16}] * (grid != "smoke")
    return cross("scan_both", sizes, [("for=invariants",), ("bare", "for=invariants")], LOW_PRECISIONS[:2])


def invariants(case: Case) -> dict[str, Relation]:
    """Return that y doubles with u, that clips are independent, and that the directions may be exchanged.

    Of halves of the tokens the sums of directions are rounded once more, so that they need not add up by the rule.
    """
    clips = scan.per_clip(case)
    return {
        "homogeneity": symmetries.homogeneity(("u", "u" + BACKWARD)),
        "permutation": symmetries.permutation(clips | {name + BACKWARD for name in clips}),
        "reversal": symmetries.reversal(time_axes(case), exchange),
    }  # fmt: skip


def exchange(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the leaves with those of one direction in the places of the other's."""
    names = [name for name in PAIRED if name in leaves]
    return leaves | {n: leaves[n + BACKWARD] for n in names} | {n + BACKWARD: leaves[n] for n in names}


def races() -> list[Race]:
    """Return the race of both directions, in `full` at more lengths: upstream's scan is at its best at multiples of 2048.

    Two more races have inputs that forget fast and inputs that remember. This operator's time does not depend on them, as the
    mixer's does, so they are timed where they are named.
    """
    more = (*race.FULL_SHAPES, (8, 1152, 2048), (1, 1152, 12288), (64, 1152, 197), (1, 1152, 9409), (1, 1152, 100353))
    graphs = ((1, 1152, 9409), (8, 1152, 1569), (64, 1152, 197), (1, 1152, 12545))

    def points(name: str, grid: str, full: tuple[race.Shape, ...]) -> list[Point]:
        replayed = [Point(name, tuple(scan.timed_sizes(*shape).items()), "infer", "graph") for shape in graphs]
        return race.operator_points(name, grid, scan.timed_sizes, full=full) + (replayed if grid == "full" else [])

    both = Race(
        "scan-both", order=2, points=lambda grid: points("scan-both", grid, more), contenders=(("scan_both", ""),),
        channels_first=("fused:mamba_ssm",), title="the scan in both directions",
        words=lambda n: f"scan in both directions, {race.rows(n)}, {n['E']:,} channels",
    )  # fmt: skip

    def with_memory(option: str) -> Race:
        name, licensed = f"scan-both-{option}", lambda dtype: (f"B2-L197-E384-N16-{option}-{dtype}",)
        own = lambda grid: points(name, grid, graphs)  # noqa: E731
        variant = option.replace("-", " ")
        return replace(both, name=name, points=own, options=(option,), licence=licensed, by_default=False, variant=variant)

    return [both, with_memory("fresh"), with_memory(LONG_MEMORY)]


def licence(dtype: str) -> tuple[str, ...]:
    """Return one case."""
    return (f"B2-L197-E384-N16-{dtype}",)


def bound(point: Point, variant: str, ceilings: Ceilings) -> float:
    """Return the seconds of two scans."""
    return 2 * scan.bound(point, variant, ceilings)
