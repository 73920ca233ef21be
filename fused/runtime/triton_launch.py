"""Helpers to launch Triton kernels on their tensors' device."""

import functools
from contextlib import AbstractContextManager, nullcontext

import torch
import triton

NATIVE = not triton.knobs.runtime.interpret  # Triton's interpreter knows no PTX
FUSED_MULTIPLY_ADD = {"enable_fp_fusion": True}  # for every launch: Triton 3.9 warns where it is not said and will change it
_NO_CONTEXT: AbstractContextManager[object] = nullcontext()


def launching_on(device: torch.device) -> AbstractContextManager[object]:
    """Return a context in which `device` is current; an empty one where it already is, and on a CPU (the interpreter)."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return _NO_CONTEXT
    return torch.cuda.device(device)


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
