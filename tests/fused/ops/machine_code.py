"""Hashes of the machine code of the selective scan's kernels, for showing that an edit of their source moves no instruction.

    python tests/fused/ops/machine_code.py [sm_90] > hashes

prints a line for every tuned configuration and kernel. Run it before and after the edit and compare the two files. The version
of NVRTC must be the same. It needs no GPU and takes half a minute on two cores.
"""

import hashlib
import itertools
import struct
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

import torch

from fused.ops.selective_scan import kernel_source
from fused.ops.selective_scan.kernel_source import SOFTPLUS_BY_CALLER, SOFTPLUS_IN_KERNEL, SOFTPLUS_NONE
from fused.ops.selective_scan.schedule import make_schedule
from fused.runtime import nvrtc

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


class Configuration(NamedTuple):
    """The settings with which the kernels are compiled."""

    N: int
    directions: int
    io_dtype: torch.dtype
    softplus: int
    has_z: bool
    keeps: bool  # what a backward needs; the backward's kernels are compiled too
    no_padding: bool  # else the code for sizes and strides that allow no access to four elements at once


def configurations() -> Iterator[Configuration]:
    """Yield the configurations that the models use, then those of other sizes."""
    used = (SOFTPLUS_IN_KERNEL, SOFTPLUS_BY_CALLER)
    for args in itertools.product((16,), (1, 2), (BF16, FP16, FP32), used, (False, True), (False, True)):
        yield Configuration(*args, no_padding=True)
    for directions, softplus in itertools.product((1, 2), (SOFTPLUS_NONE, *used)):
        yield Configuration(16, directions, BF16, softplus, has_z=True, keeps=True, no_padding=False)
    for N, directions, no_padding in itertools.product((32, 48, 64), (1, 2), (False, True)):
        yield Configuration(N, directions, BF16, SOFTPLUS_IN_KERNEL, has_z=True, keeps=True, no_padding=no_padding)


def hashes(cubin: bytes) -> dict[str, str]:
    """Return a hash of the instructions of each kernel: of the ELF file's sections ".text.KERNEL"."""
    table = struct.unpack_from("<Q", cubin, 40)[0]
    size, count, names_index = struct.unpack_from("<HHH", cubin, 58)
    sections = [struct.unpack_from("<IIQQQQIIQQ", cubin, table + i * size) for i in range(count)]
    found = {}
    for name_offset, _, _, _, offset, length, *_ in sections:
        start = sections[names_index][4] + name_offset
        name = cubin[start : cubin.index(b"\0", start)].decode()
        if name.startswith(".text."):
            found[name.removeprefix(".text.")] = hashlib.sha256(cubin[offset : offset + length]).hexdigest()[:24]
    return found


def lines(c: Configuration, arch: str) -> list[str]:
    """Compile a configuration for `arch` and return a line for each of its kernels."""
    macros = kernel_source.defines(
        io_dtype=c.io_dtype, schedule=make_schedule(1, 16, 64, c.N, c.directions, 1), directions=c.directions,
        vectorized=c.no_padding, vectorized_bc=c.no_padding, no_padding=c.no_padding,
        softplus=c.softplus, has_z=c.has_z, store_tile_states=c.keeps,
    )  # fmt: skip
    label = " ".join(f"{name}={value}" for name, value in c._asdict().items())
    found = {}
    for name in ("forward", "backward") if c.keeps else ("forward",):
        found |= hashes(nvrtc.compile(kernel_source.source(name), macros, arch))
    return [f"{label} {kernel} {digest}" for kernel, digest in sorted(found.items())]


if __name__ == "__main__":
    with ProcessPoolExecutor() as pool:
        for found in pool.map(lines, configurations(), itertools.repeat(sys.argv[1] if len(sys.argv) > 1 else "sm_90")):
            print("\n".join(found), flush=True)
