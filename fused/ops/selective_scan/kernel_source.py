"""The scan's CUDA C++ and the macros that it is compiled with."""

import functools
from pathlib import Path

from fused.ops.selective_scan.schedule import Plan

FILES = ("../../runtime/device.cuh", "common.cu", "forward.cu", "backward.cu")
LOGARITHM, REVERSE, STATES_ONLY = 1, 2, 4
PLACES = 1024  # at which blocks are counted: the schedulers of 256 multiprocessors


@functools.cache
def source(keeps: bool) -> str:
    """The kernels' CUDA C++; those of the backward, half of the time that compiling takes, where there will be one."""
    names = FILES if keeps else FILES[:-1]
    return "\n".join((Path(__file__).parent / name).read_text(encoding="utf-8") for name in names)


def defines(
    io: int, plan: Plan, directions: int, vector: int, vector_bc: int, exact: int, softplus: int, gated: int, keeps: int
) -> tuple[tuple[str, int], ...]:
    """What scan_common.cu says that the kernels are compiled with."""
    forward, backward = plan.forward, plan.backward
    return (
        ("IO", io), ("STATES", plan.states), ("VECTOR", vector), ("VECTOR_BC", vector_bc), ("EXACT", exact),
        ("DIRECTIONS", directions), ("SOFTPLUS", softplus), ("GATED", gated), ("KEEPS", keeps),
        ("FORWARD_CHANNELS", forward.channels), ("FORWARD_WARPS", forward.warps), ("FORWARD_BLOCKS", forward.blocks),
        ("BACKWARD_CHANNELS", backward.channels), ("BACKWARD_WARPS", backward.warps), ("BACKWARD_BLOCKS", backward.blocks),
        ("PIECE", backward.piece), ("PLACES", PLACES),
    )  # fmt: skip
