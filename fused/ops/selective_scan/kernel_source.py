"""CUDA C++ source of the selective scan, and the macros that it is compiled with."""

import functools
from pathlib import Path

import torch

from fused.ops.selective_scan.schedule import ScanSchedule
from fused.runtime.nvrtc import Defines

FORWARD_FILES = ("../../runtime/device.cuh", "common.cu", "work.cu", "forward.cu")
BACKWARD_FILES = ("backward.cu", "backward_reduce.cu")
IO_DTYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
SOFTPLUS_NONE, SOFTPLUS_IN_KERNEL, SOFTPLUS_BY_CALLER = 0, 1, 2  # values of SOFTPLUS in common.cu
A_LOG, REVERSE, STATES_ONLY = 1, 2, 4  # bits of the kernels' argument `flags`, as in common.cu
SCHEDULER_COUNTERS = 1024  # one for each of the four schedulers of up to 256 multiprocessors


@functools.cache
def source(keeps: bool) -> str:
    """Return the CUDA C++ of scan_forward and, if the forward `keeps` what a backward needs, of the backward's kernels.

    Compiling the backward takes half of the time, so a scan without gradients goes without it.
    """
    files = FORWARD_FILES + (BACKWARD_FILES if keeps else ())
    return "\n".join((Path(__file__).parent / name).read_text(encoding="utf-8") for name in files)


@functools.lru_cache(1024)
def defines(
    *,
    io_dtype: torch.dtype,
    schedule: ScanSchedule,
    directions: int,
    vectorized: bool,
    vectorized_bc: bool,
    no_padding: bool,
    softplus: int,
    has_z: bool,
    store_tile_states: bool,
) -> Defines:
    """Return the macros of `source`; common.cu says what each means.

    `softplus` is one of SOFTPLUS_NONE, SOFTPLUS_IN_KERNEL, SOFTPLUS_BY_CALLER. Raises KeyError for an `io_dtype` that the
    kernels do not have.
    """
    fwd, bwd = schedule.fwd_config, schedule.bwd_config
    return (
        ("IO_DTYPE", IO_DTYPES[io_dtype]),
        ("PADDED_STATES", schedule.padded_states),
        ("VECTORIZED", int(vectorized)),
        ("VECTORIZED_BC", int(vectorized_bc)),
        ("NO_PADDING", int(no_padding)),
        ("DIRECTIONS", directions),
        ("SOFTPLUS", softplus),
        ("HAS_Z", int(has_z)),
        ("STORE_TILE_STATES", int(store_tile_states)),
        ("FWD_CHANNELS_PER_THREAD", fwd.channels_per_thread),
        ("FWD_WARPS", fwd.warps),
        ("FWD_MIN_BLOCKS_PER_SM", fwd.min_blocks_per_sm),
        ("BWD_CHANNELS_PER_THREAD", bwd.channels_per_thread),
        ("BWD_WARPS", bwd.warps),
        ("BWD_MIN_BLOCKS_PER_SM", bwd.min_blocks_per_sm),
        ("SUBTILE", bwd.subtile),
        ("SCHEDULER_COUNTERS", SCHEDULER_COUNTERS),
    )


def num_work_counters(num_split_sequences: int) -> int:
    """Return how many int32 counters, zeros, the WorkQueue of a launch needs (work.cu)."""
    return 3 + SCHEDULER_COUNTERS + num_split_sequences
