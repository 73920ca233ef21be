"""The CUDA C++ programs of a model's scan, and their compilation by NVRTC into the cache, without a GPU."""

import time
from collections.abc import Iterable
from typing import NamedTuple

import torch

from fused.models.videomamba.config import VideoMambaConfig
from fused.modules.mamba import Mamba
from fused.ops.selective_scan.kernel_source import Program, mixer_programs, source
from fused.ops.selective_scan.schedule import make_schedule
from fused.runtime import cubin_cache, nvrtc

PROCESSORS = 132  # of an H200; their number decides how a launch shares out its work, not with which sizes it is compiled


class Compiled(NamedTuple):
    """A program or kernel that is in a cache now."""

    name: str
    from_cache: bool
    seconds: float


def programs_of(config: VideoMambaConfig, dtype: torch.dtype, batch: int) -> tuple[Program, ...]:
    """Return the programs that inference and training of a model on `batch` clips need, by either native backend.

    The scan's inputs have the dtype of the model, or of autocast.
    """
    with torch.device("meta"):
        mixer = Mamba(config.embed_dim, **dict(config.ssm_cfg or {}), bimamba=config.bimamba)
    L, E, N, directions = 1 + config.tubelets * config.patches, mixer.d_inner, mixer.d_state, len(mixer.directions())
    schedule = make_schedule(batch, L, E, N, directions, PROCESSORS)
    return mixer_programs(schedule, E, N, directions, dtype, has_z=True, training=True, kept=False)


def compile_program(program: Program, arch: str) -> Compiled:
    """Fill the cache with a program for "sm_90" or another architecture.

    Raises as `nvrtc.compile` does, and OSError if the cache cannot be written.
    """
    begun, key = time.perf_counter(), (source(program.name), program.defines, arch)
    file = cubin_cache.path_of(nvrtc.cache_key(*key))
    is_there = cubin_cache.read(file) is not None
    nvrtc.cubin(*key)
    if cubin_cache.read(file) is None:
        raise OSError(f"{file.parent} cannot be written")
    return Compiled(title_of(program), is_there, time.perf_counter() - begun)


def title_of(program: Program) -> str:
    """Return what a program is called in messages."""
    stores = program.name == "forward" and dict(program.defines)["STORE_TILE_STATES"]
    return f"scan {program.name} {'for training ' if stores else ''}(CUDA C++)"


def unique(values: Iterable[str]) -> list[str]:
    """Return the values in order, each once."""
    return list(dict.fromkeys(values))
