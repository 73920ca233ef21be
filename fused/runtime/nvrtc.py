"""Compilation of CUDA C++ at first use. No CUDA toolkit is needed and nothing is built at install.

NVRTC, which comes with PyTorch's CUDA build, compiles. Kernels that will be needed soon are compiled in background threads
(`background.py`). Machine code is kept on disk (`cubin_cache.py`). The driver loads it (`cuda_module.py`).

A kernel is `extern "C" __global__ void` and takes pointers, `long long` and `float` only. The same source runs on the CPU;
tests/fused/runtime/emulation.h gives the rules for that.
"""

import functools
import re
import threading
from typing import Any, NamedTuple

import torch

from fused.errors import BackendError
from fused.runtime import ahead, background, cubin_cache, cuda_module
from fused.runtime.cuda_module import KernelError, Module

MIN_COMPUTE_CAPABILITY = (8, 0)  # for bfloat16 and asynchronous copies
Defines = tuple[tuple[str, int], ...]  # macros: (name, value)


class Resources(NamedTuple):
    """Resources of a kernel, as the assembler reports them."""

    registers: int  # of a thread
    shared: int  # bytes of static shared memory of a block
    spills: int  # bytes of spill loads and stores of a thread
    stack: int  # bytes of a thread


def unavailable(device: torch.device | str) -> str | None:
    """Return None if kernels can be compiled for `device` and run on it, else one sentence: the reason, and what to install."""
    device = torch.device(device)
    if device.type != "cuda":
        return f"CUDA kernels run on NVIDIA GPUs only and the input is on {device.type}: move it to a GPU."
    if not torch.cuda.is_available() or not torch.version.cuda:
        return "PyTorch sees no NVIDIA GPU: install PyTorch's CUDA build, and the driver."
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_COMPUTE_CAPABILITY:
        return f"{torch.cuda.get_device_name(device)} is sm_{capability[0]}{capability[1]}; the kernels need sm_80 or newer."
    return compiler_unavailable()


@functools.cache
def compiler_unavailable() -> str | None:
    """Return None if NVRTC can be called, else the reason and what to install. Needs no GPU."""
    try:
        cuda_module.bindings("driver")
        cuda_module.bindings("nvrtc").nvrtcVersion()
    except Exception as error:  # a missing package, or a shared library that does not load
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        major = (torch.version.cuda or "13").split(".")[0]  # the packages must fit PyTorch's own CUDA
        wheel = "nvidia-cuda-nvrtc" + ("-cu12" if major == "12" else "")
        return f'NVRTC cannot be used ({reason}): pip install "cuda-bindings=={major}.*" "{wheel}=={major}.*"'
    return None


def compile(source: str, defines: Defines, arch: str) -> bytes:
    """Return the machine code (cubin) of `source` with the macros `defines` for `arch` ("sm_80", "sm_90", "sm_100").

    Needs no GPU, and no driver. Raises KernelError with NVRTC's first lines and the macros, BackendError if there is no NVRTC.
    """
    return _compile(source, defines, arch)[0]


def cache_key(source: str, defines: Defines, arch: str) -> tuple[object, ...]:
    """Return the key of machine code in `cubin_cache`. Raises BackendError if there is no NVRTC.

    The driver has no part in it: machine code is the compiler's, which works where there is no driver too.
    """
    reason = compiler_unavailable()
    if reason:
        raise BackendError(reason)
    return source, defines, arch, cuda_module.bindings("nvrtc").nvrtcVersion()[1:]


def cubin(source: str, defines: Defines, arch: str) -> bytes:
    """Return what `compile` returns, from disk if it is kept there, else compiled and then kept. Raises as `compile` does."""
    return cubin_cache.cached(cache_key(source, defines, arch), lambda: compile(source, defines, arch))


def start(source: str, defines: Defines, device: torch.device) -> None:
    """Start compiling in a background thread what a call of `module` with the same arguments will take. It does not wait.

    Where kernels cannot run, and for an error of the compiler, nothing happens here: `module` raises it.
    """
    if (source, defines, device.type, device.index) not in _modules and unavailable(device) is None:
        arch = arch_of(device)
        background.start((source, defines, arch), lambda: cubin(source, defines, arch))


def architectures() -> list[str]:
    """Return the architectures for which NVRTC compiles and the kernels are made, from "sm_80" on. There must be an NVRTC."""
    oldest = 10 * MIN_COMPUTE_CAPABILITY[0] + MIN_COMPUTE_CAPABILITY[1]
    return [f"sm_{arch}" for arch in cuda_module.bindings("nvrtc").nvrtcGetSupportedArchs()[1] if arch >= oldest]


def arch_of(device: torch.device | None = None) -> str:
    """Return the architecture of a GPU, by default of the current one: "sm_90" for compute capability 9.0."""
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


def resources(source: str, defines: Defines, arch: str) -> dict[str, Resources]:
    """Return the resources of each kernel of `source` on `arch`. Needs no GPU. Raises as `compile` does."""
    log = _compile(source, defines, arch, "--ptxas-options=-v")[1]
    found = {}
    for entry in log.split("Compiling entry function '")[1:]:
        counts = {name: int(count) for count, name in re.findall(r"(\d+) (?:bytes )?(registers|smem|stack|spill \w+)", entry)}
        spills = counts.get("spill stores", 0) + counts.get("spill loads", 0)
        found[entry.split("'")[0]] = Resources(counts["registers"], counts.get("smem", 0), spills, counts.get("stack", 0))
    return found


def module(source: str, defines: Defines, device: torch.device) -> Module | ahead.NoModule:
    """Return the kernels of `source`, compiled with the macros `defines` and loaded on `device`; once a process.

    In a thread that compiles ahead there is no module.

    Raises BackendError if kernels cannot run on `device`, KernelError if the source does not compile or load.
    """
    if ahead.capability():
        return ahead.NoModule()
    index = torch.cuda.current_device() if device.type == "cuda" and device.index is None else device.index
    key = (source, defines, device.type, index)
    found = _modules.get(key)
    if found is None:
        with _lock:
            found = _modules.get(key)
            if found is None:
                found = _modules[key] = _compile_and_load(source, defines, torch.device(device.type, index))
    return found


_modules: dict[tuple[str, Defines, str, int | None], Module] = {}
_lock = threading.RLock()


def _compile_and_load(source: str, defines: Defines, device: torch.device) -> Module:
    reason = unavailable(device)
    if reason:
        raise BackendError(reason)
    arch = arch_of(device)
    key = (source, defines, arch)
    return Module(background.take(key, lambda: cubin(source, defines, arch)), device.index)


def _compile(source: str, defines: Defines, arch: str, *more_options: str) -> tuple[bytes, str]:
    """Return the machine code and NVRTC's log."""
    reason = compiler_unavailable()
    if reason:
        raise BackendError(reason)
    nvrtc = cuda_module.bindings("nvrtc")
    macros = [f"{name}={value}" for name, value in defines]
    options = ["--std=c++17", f"--gpu-architecture={arch}", *more_options, *(f"-D{macro}" for macro in macros)]
    _, program = nvrtc.nvrtcCreateProgram(source.encode(), b"kernels.cu", 0, [], [])
    try:
        (error,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
        log = _read_buffer(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program).decode(errors="replace")
        log = log.strip("\0\n ")
        if error != 0:
            lines = log.splitlines()
            shown = "\n".join(lines[:20] + [f"... and {len(lines) - 20} lines more"] * (len(lines) > 20))
            used = " ".join(macros) or "no macros"
            raise KernelError(f"kernels do not compile for {arch} with {used}: {error.name}\n{shown}")
        return _read_buffer(nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN, program), log
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _read_buffer(get_size: Any, read: Any, program: Any) -> bytes:
    """Return the bytes that an NVRTC call writes into a buffer of the caller."""
    buffer = bytearray(get_size(program)[1])
    read(program, buffer)
    return bytes(buffer)
