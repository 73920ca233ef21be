"""Helpers to launch Triton kernels on their tensors' device."""

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton

from fused.runtime import ahead, cuda_module, recording
from fused.runtime.recording import Argument, Function

NATIVE = not triton.knobs.runtime.interpret  # Triton's interpreter knows no PTX
FUSED_MULTIPLY_ADD = {"enable_fp_fusion": True}  # for every launch: Triton 3.9 warns where it is not said and will change it
_NO_CONTEXT: AbstractContextManager[object] = nullcontext()


def launching_on(device: torch.device) -> AbstractContextManager[object]:
    """Return a context in which `device` is current; an empty one where it already is, and on a CPU (the interpreter)."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return _NO_CONTEXT
    return torch.cuda.device(device)


def launch(kernel: Any, device: torch.device, grid: tuple[int, ...], *args: Argument, **constants: Any) -> None:
    """Queue a Triton kernel on the current stream of its tensors' device, and note it in a record.

    `args` are positional parameters of the kernel; `constants` are the rest of them and Triton's options. In a thread that
    compiles ahead the kernel is only compiled.
    """
    compile = ahead.compiler()
    if compile is not None:
        compile(kernel, args, constants)
        return

    def call(*tensors: Argument) -> Any:
        with launching_on(device):
            if device.type == "cuda":
                ahead.wait(kernel, tensors, constants)
                compiled = kernel.warmup(*tensors, grid=grid, **constants)
                loaded = _load(compiled, device.index)
                if loaded is not None:
                    loaded.launch(grid, tensors)
                    return loaded
            kernel[grid](*tensors, **constants)
            return None

    recording.launch(call, args, lambda loaded: None if loaded is None else loaded.function(grid, args))


class _Loaded:
    """A compiled Triton kernel that this project's own launcher launches: Triton builds one by a C compiler for each kernel.

    Triton's kernels take the arguments that were not compiled into them, and then up to two pointers to scratch memory.
    """

    def __init__(self, module: cuda_module.Module, metadata: Any, taken: list[bool], scratch: int) -> None:
        self._module, self._name, self._taken, self._scratch = module, metadata.name, taken, (None,) * scratch
        self._threads, self._shared = 32 * metadata.num_warps, metadata.shared

    def launch(self, grid: tuple[int, ...], args: tuple[Argument, ...]) -> None:
        """Queue the kernel; `args` are all positional parameters."""
        self._module.launch(self._name, _three(grid), self._threads, self._shared, *self._arguments(args))

    def function(self, grid: tuple[int, ...], args: tuple[Argument, ...]) -> Function:
        """Return what the driver is told at such a launch, which has been made before."""
        return self._module.function(self._name, _three(grid), self._threads, self._shared, self._arguments(args))

    def _arguments(self, args: tuple[Argument, ...]) -> tuple[Argument, ...]:
        return *(arg for arg, taken in zip(args, self._taken, strict=False) if taken), *self._scratch


@functools.cache
def _load(compiled: Any, index: int) -> _Loaded | None:
    """Return a compiled kernel on a device. None for one whose launch needs more than blocks, threads and arguments."""
    needs_more = ("num_ctas", 1), ("launch_cooperative_grid", False), ("launch_pdl", False), ("global_scratch_size", 0)
    if any((getattr(compiled.metadata, name, usual) or usual) != usual for name, usual in needs_more):
        return None
    module = cuda_module.Module(compiled.asm["cubin"], index, int32=True)
    taken = [kind != "constexpr" for kind in compiled.src.signature.values()]
    scratch = len(module.parameter_sizes(compiled.metadata.name)) - sum(taken)
    return _Loaded(module, compiled.metadata, taken, scratch) if 0 <= scratch <= 2 else None


def _three(grid: tuple[int, ...]) -> tuple[int, int, int]:
    x, y, z = (*grid, 1, 1)[:3]
    return x, y, z


def capability(device: torch.device) -> int:
    """Return 90 for compute capability 9.0; for a CPU what this thread compiles for, or 0."""
    return _capability(device) if device.type == "cuda" else ahead.capability()


@functools.cache
def _capability(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def blocks(count: int, each: int) -> int:
    """Return count / each, rounded up. Triton's own cdiv and next_power_of_2 take ten microseconds on the host."""
    return -(-count // each)


def power_of_2(count: int) -> int:
    """Return the next power of 2 from `count`, at least 1."""
    return 1 << (count - 1).bit_length()
