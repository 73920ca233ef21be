"""How Triton kernels launch: on their tensors' device, whichever is current, on how many blocks, and with PTX or without."""

import functools
from contextlib import AbstractContextManager, nullcontext

import torch
import triton

NATIVE = not triton.knobs.runtime.interpret  # Triton's interpreter knows no PTX
_HERE: AbstractContextManager[object] = nullcontext()


def launching_on(device: torch.device) -> AbstractContextManager[object]:
    """A context in which `device` is current; free of charge where it already is, and on a CPU (Triton's interpreter)."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device(device)


@functools.cache
def capability(device: torch.device) -> int:
    """90 for compute capability 9.0; 0 for a CPU."""
    major, minor = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    return 10 * major + minor


def blocks(count: int, each: int) -> int:
    """How many of `each` hold `count`. Triton's own cdiv and next_power_of_2 take ten microseconds on the host."""
    return -(-count // each)


def power_of_2(count: int) -> int:
    """The next one from `count`, at least 1."""
    return 1 << (count - 1).bit_length()
