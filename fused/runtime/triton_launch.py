"""Helpers to launch Triton kernels on their tensors' device."""

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton

from fused.runtime import cuda_module, recording
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

    `args` are positional parameters of the kernel; `constants` are the rest of them and Triton's options.
    """

    def call(*tensors: Argument) -> Any:
        with launching_on(device):
            return kernel[grid](*tensors, **constants)

    recording.launch(call, args, lambda compiled: _function(compiled, grid, args))


def _function(compiled: Any, grid: tuple[int, ...], args: tuple[Argument, ...]) -> Function | None:
    """Return what the driver is told at the launch of a compiled kernel. None under the interpreter, and where it needs more.

    Triton's kernels take the arguments that were not compiled into them, and then up to two pointers to scratch memory.
    """
    if compiled is None:
        return None
    metadata = compiled.metadata
    needs_more = ("num_ctas", 1), ("launch_cooperative_grid", False), ("launch_pdl", False), ("global_scratch_size", 0)
    if any((getattr(metadata, name, usual) or usual) != usual for name, usual in needs_more):
        return None
    kinds = [*compiled.src.signature.values()][: len(args)]
    taken = tuple(arg for arg, kind in zip(args, kinds, strict=True) if kind != "constexpr")
    handle = cuda_module.bindings("driver").CUfunction(compiled.function)
    sizes = cuda_module.parameter_sizes(handle) or [8] * len(taken)
    if not 0 <= len(sizes) - len(taken) <= 2:
        return None
    x, y, z = (*grid, 1, 1)[:3]
    return Function(handle, (x, y, z), 32 * metadata.num_warps, metadata.shared, taken, sizes)


_compiled_for = 0


def compile_for(capability: int) -> None:
    """Make this process, which compiles kernels without a GPU, choose the options for a compute capability (90 for 9.0).

    It must be called before any kernel is launched.
    """
    global _compiled_for
    _compiled_for = capability


@functools.cache
def capability(device: torch.device) -> int:
    """Return 90 for compute capability 9.0, and 0 for a CPU, unless `compile_for` was called."""
    if device.type != "cuda":
        return _compiled_for
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def blocks(count: int, each: int) -> int:
    """Return count / each, rounded up. Triton's own cdiv and next_power_of_2 take ten microseconds on the host."""
    return -(-count // each)


def power_of_2(count: int) -> int:
    """Return the next power of 2 from `count`, at least 1."""
    return 1 << (count - 1).bit_length()
