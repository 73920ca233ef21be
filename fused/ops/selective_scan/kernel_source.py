"""CUDA C++ source of the selective scan, and the macros that it is compiled with."""

import functools
from pathlib import Path
from typing import NamedTuple

import torch

from fused.ops.selective_scan.schedule import ScanSchedule
from fused.runtime.nvrtc import Defines

COMMON_FILES = ("../../runtime/device.cuh", "common.cu", "work.cu")
FILES = {"forward": ("forward.cu", "moments.cu", "forward_kernel.cu"), "backward": ("backward.cu", "backward_reduce.cu")}
IO_DTYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
SOFTPLUS_NONE, SOFTPLUS_IN_KERNEL, SOFTPLUS_BY_CALLER = 0, 1, 2  # values of SOFTPLUS in common.cu
A_LOG, REVERSE, STATES_ONLY, BY_MOMENTS = 1, 2, 4, 8  # bits of the kernels' argument `flags`, as in common.cu
SCHEDULER_COUNTERS = 1024  # one for each of the four schedulers of up to 256 multiprocessors


@functools.cache
def source(name: str) -> str:
    """Return the CUDA C++ of scan_forward ("forward"), or of scan_backward and scan_backward_reduce ("backward").

    They are two programs, so that two threads compile them at the same time, and a scan without gradients needs one alone.
    """
    files = COMMON_FILES + FILES[name]
    return "\n".join((Path(__file__).parent / file).read_text(encoding="utf-8") for file in files)


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
    query_rows: bool = False,
) -> Defines:
    """Return the macros of `source`; common.cu says what each means.

    `softplus` is one of SOFTPLUS_NONE, SOFTPLUS_IN_KERNEL, SOFTPLUS_BY_CALLER. Raises KeyError for an `io_dtype` that the
    kernels do not have.
    """
    fwd, bwd = schedule.fwd_config, schedule.bwd_config
    rows = (("QUERY_ROWS", 1),) if query_rows else ()
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
        *rows,
    )


class Program(NamedTuple):
    """A name of `source` and the macros that it is compiled with."""

    name: str
    defines: Defines


@functools.lru_cache(1024)
def mixer_programs(
    schedule: ScanSchedule, E: int, N: int, directions: int, io_dtype: torch.dtype, has_z: bool, training: bool, kept: bool
) -> tuple[Program, ...]:
    """Return the programs of a mixer's scan in the order in which they are needed.

    With `training` these include the backward, and the forward that stores what it reads. The first forward stores that itself
    if it is `kept`; otherwise a forward that stores nothing comes first. The tensors are those of a mixer: dense, or halves of
    dense ones, with delta after softplus.
    """
    vectorized, vectorized_bc = E % 4 == 0, N % 4 == 0
    fits = N == schedule.padded_states and E % schedule.widest_block == 0

    def program(name: str, store_tile_states: bool) -> Program:
        macros = defines(
            io_dtype=io_dtype, schedule=schedule, directions=directions,
            vectorized=vectorized, vectorized_bc=vectorized_bc, no_padding=vectorized and vectorized_bc and fits,
            softplus=SOFTPLUS_BY_CALLER, has_z=has_z, store_tile_states=store_tile_states,
        )  # fmt: skip
        return Program(name, macros)

    plain = () if training and kept else (program("forward", False),)
    return (*plain, program("forward", True), program("backward", True)) if training else plain


def num_work_counters(num_split_sequences: int, may_exit: bool = False) -> int:
    """Return how many int32 counters, zeros, the WorkQueue of a launch needs (work.cu)."""
    return 3 + SCHEDULER_COUNTERS + (3 * num_split_sequences + 1 if may_exit else num_split_sequences)
