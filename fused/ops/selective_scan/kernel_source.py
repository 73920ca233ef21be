"""The scan's CUDA C++ and the macros that it is compiled with."""

import functools
from pathlib import Path

from fused.ops.selective_scan.schedule import ScanSchedule

FILES = ("../../runtime/device.cuh", "common.cu", "forward.cu", "backward.cu")
LOGARITHM, REVERSE, STATES_ONLY = 1, 2, 4
PLACES = 1024  # at which blocks are counted: the schedulers of 256 multiprocessors


@functools.cache
def source(keeps: bool) -> str:
    """The kernels' CUDA C++; those of the backward, half of the time that compiling takes, where there will be one."""
    names = FILES if keeps else FILES[:-1]
    return "\n".join((Path(__file__).parent / name).read_text(encoding="utf-8") for name in names)


def defines(
    io: int, schedule: ScanSchedule, directions: int, vector: int, vector_bc: int, exact: int, softplus: int, gated: int,
    keeps: int,
) -> tuple[tuple[str, int], ...]:  # fmt: skip
    """What scan_common.cu says that the kernels are compiled with."""
    forward, backward = schedule.fwd_config, schedule.bwd_config
    return (
        ("IO", io), ("STATES", schedule.padded_states), ("VECTOR", vector), ("VECTOR_BC", vector_bc), ("EXACT", exact),
        ("DIRECTIONS", directions), ("SOFTPLUS", softplus), ("GATED", gated), ("KEEPS", keeps),
        ("FORWARD_CHANNELS", forward.channels_per_thread), ("FORWARD_WARPS", forward.warps),
        ("FORWARD_BLOCKS", forward.min_blocks_per_sm),
        ("BACKWARD_CHANNELS", backward.channels_per_thread), ("BACKWARD_WARPS", backward.warps),
        ("BACKWARD_BLOCKS", backward.min_blocks_per_sm),
        ("PIECE", backward.subtile), ("PLACES", PLACES),
    )  # fmt: skip
