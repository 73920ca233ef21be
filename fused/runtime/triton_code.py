"""Machine code of Triton's kernels, kept beside that of CUDA C++ and found there without Triton.

From its own cache Triton needs tens of milliseconds for a kernel, and most of a second for a digest of itself.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import triton
from torch import Tensor

from fused.runtime import cubin_cache
from fused.runtime.recording import Argument

# values of metadata that a launch by this project allows; another needs Triton's own launcher
_USUAL = {"num_ctas": 1, "launch_cooperative_grid": False, "launch_pdl": False, "global_scratch_size": 0}


class Code(NamedTuple):
    """A compiled kernel: its name there, the threads and dynamic shared bytes of a block, and which parameters it takes."""

    cubin: bytes
    name: str
    threads: int
    shared: int
    taken: tuple[bool, ...]  # of the kernel's parameters; the others are compiled into it


def key_of(kernel: Any, args: tuple[Argument, ...], constants: dict[str, Any]) -> tuple[Any, ...]:
    """Return what the machine code depends on of a launch: no less than what Triton distinguishes."""
    parameters = getattr(kernel, "params", ())
    constant = {p.num for p in parameters if p.is_constexpr}
    free = {p.num for p in parameters if p.do_not_specialize}
    kinds = (("constant", type(x), x) if i in constant else _kind(x, i in free) for i, x in enumerate(args))
    return *kinds, *sorted(constants.items())


def _kind(x: Any, free: bool) -> Any:
    """Return the part of an argument that is compiled into a kernel; of a `free` integer that is its width."""
    if isinstance(x, Tensor):
        return x.dtype, x.data_ptr() % 16 == 0
    if type(x) is int:
        width = 32 if -(2**31) <= x < 2**31 else 64
        return (width,) if free else (width, x == 1, x % 16 == 0)
    return type(x) if isinstance(x, float) else (type(x), x)


def of(kernel: Any, args: tuple[Any, ...], constants: dict[str, Any], capability: int) -> Code | None:
    """Return a kernel's code for the current device, compiled if none is kept; None if only Triton can launch it.

    `capability` is 90 for 9.0.
    """
    if hasattr(kernel, "cache_key") and not triton.knobs.compilation.always_compile:
        head, _, cubin = (cubin_cache.read(path_of(kernel, args, constants, capability)) or b"").partition(b"\n")
        if cubin:
            name, threads, shared, taken = json.loads(head)
            return Code(cubin, name, threads, shared, tuple(taken))
    return compile(kernel, args, constants, capability)


def compile(kernel: Any, args: tuple[Any, ...], constants: dict[str, Any], capability: int) -> Code | None:
    """Ask Triton for a kernel, keep its code and return it; None, and nothing is kept, for one that only Triton can launch."""
    compiled = kernel.warmup(*args, grid=(1, 1, 1), **constants)
    metadata = compiled.metadata
    if any((getattr(metadata, name, usual) or usual) != usual for name, usual in _USUAL.items()):
        return None
    taken = tuple(kind != "constexpr" for kind in compiled.src.signature.values())
    code = Code(compiled.asm["cubin"], metadata.name, 32 * metadata.num_warps, metadata.shared, taken)
    if hasattr(kernel, "cache_key"):
        path = path_of(kernel, args, constants, capability)
        cubin_cache.keep(path, json.dumps(code[1:]).encode() + b"\n" + code.cubin)
    return code


def path_of(kernel: Any, args: tuple[Any, ...], constants: dict[str, Any], capability: int) -> Path:
    """Return the file in which a kernel's code is kept."""
    key = key_of(kernel, args, constants)
    return cubin_cache.path_of(("triton", triton.__version__, _environment(), kernel.cache_key, key, capability))


def _environment() -> Any:
    """Return the environment variables that change what Triton compiles."""
    ask = getattr(triton._C.libtriton, "get_cache_invalidating_env_vars", dict)
    return sorted(ask().items())
