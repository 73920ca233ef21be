"""Selective scan in both directions over the same tokens, under one gate."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

import reference
from fused.ops.selective_scan import api as scan_api
from harness.judge.case import Case, cross
from harness.judge.registry import Implementation, fused_implementations
from harness.subjects import scan
from harness.subjects.scan import EVERY

PAIRED = ("u", "delta", "A", "B", "C", "D", "delta_bias")
BACK = "_b"


def cases(grid: str) -> list[Case]:
    """Odd and short lengths, on either side of a tile and of where the directions meet; full: the model's own."""

    def shape(B: int, L: int, E: int, N: int) -> dict[str, int]:
        return {"B": B, "L": L, "E": E, "N": N}

    tiny = cross("scan_both", [shape(2, 3, 4, 3)], [(), ("bare",)], ["float64"])
    odd = cross("scan_both", [shape(2, 1, 6, 4), shape(3, 17, 10, 16)], [(), ("bare",)], EVERY)
    if grid == "smoke":
        return [*tiny, *odd, *cross("scan_both", [shape(2, 63, 24, 16)], [()], EVERY[:2])]
    return [
        *tiny, *odd,
        *cross("scan_both", [shape(2, 65, 40, 64), shape(2, 197, 384, 16)], [(), ("bare",)], EVERY),
        *cross("scan_both", [shape(1, 1569, 1152, 16)], [()], EVERY),
        *cross("scan_both", [shape(1, 12545, 64, 16)], [()], EVERY[:2]),  # the loop takes minutes
    ]  # fmt: skip


def implementations() -> list[Implementation]:
    """Two scans of the reference, and `fused.bidirectional_scan` by backend."""

    def two(pairs: dict[str, tuple], z: Tensor | None, softplus: bool) -> Tensor:
        first, second = ({k: v[i] for k, v in pairs.items()} | {"z": z, "softplus": softplus} for i in range(2))
        return reference.selective_scan(**first)[0] + reference.selective_scan(**second, reverse=True)[0]

    def call_with(backend: str) -> Callable[..., Any]:
        return lambda pairs, z, softplus: scan_api.bidirectional_scan(**pairs, z=z, softplus=softplus, backend=backend)

    return [Implementation("reference", two), *fused_implementations(scan_api.BACKENDS, call_with)]


def draw(case: Case, seed: int) -> dict[str, Tensor]:
    """What `scan` draws, twice, with one z."""
    first, second = scan.draw(case, seed), scan.draw(case, seed + 10_000)
    return first | {k + BACK: v for k, v in second.items() if k in PAIRED}


def precise(case: Case) -> set[str]:
    """As of the scan."""
    names = scan.precise(case)
    return names | {name + BACK for name in names}


def silent(case: Case) -> set[str]:
    """There is one output."""
    return set()


def steps(case: Case) -> float:
    """Two scans."""
    return 2 * scan.steps(case)


def evaluate(call: Callable[..., Any], case: Case, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """y."""
    pairs = {k: (leaves[k], leaves[k + BACK]) for k in PAIRED if k in leaves}
    return {"y": call(pairs, leaves.get("z"), not case.has("bare"))}
