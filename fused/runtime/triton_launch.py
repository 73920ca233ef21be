"""Helpers to launch Triton kernels on their tensors' device."""

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton

from fused.runtime import ahead, cuda_module, recording, triton_code
from fused.runtime.recording import Argument, Function

NATIVE = not triton.knobs.runtime.interpret  # Triton's interpreter knows no PTX
FUSED_MULTIPLY_ADD = {"enable_fp_fusion": True}  # for every launch: Triton 3.9 warns where it is not said and will change it
_NO_CONTEXT: AbstractContextManager[object] = nullcontext()
_loaded: "dict[tuple[Any, ...], _Loaded | None]" = {}  # by kernel, device and key


def launching_on(device: torch.device) -> AbstractContextManager[object]:
    """Return a context in which `device` is current; an empty one where it already is, and on a CPU (the interpreter)."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return _NO_CONTEXT
    return torch.cuda.device(device)


def launch(kernel: Any, device: torch.device, grid: tuple[int, ...], *args: Argument, **constants: Any) -> None:
    """Queue a Triton kernel on the current stream of its tensors' device, and note it in a record.

    `args` are positional parameters of the kernel; `constants` are the rest of them and Triton's options. In a thread that
    compiles ahead the kernel is only compiled. A grid without programs launches nothing, as by Triton; the driver refuses it.
    """
    compile = ahead.compiler()
    if compile is not None:
        compile(kernel, args, constants)
        return
    if 0 in grid:
        return

    def call(*tensors: Argument) -> Any:
        with launching_on(device):
            if device.type == "cuda":
                loaded = _load(kernel, device, tensors, constants)
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

    def __init__(self, code: triton_code.Code, module: cuda_module.Module, scratch: int) -> None:
        self._code, self._module, self._scratch = code, module, (None,) * scratch

    def launch(self, grid: tuple[int, ...], args: tuple[Argument, ...]) -> None:
        """Queue the kernel; `args` are all positional parameters."""
        code = self._code
        self._module.launch(code.name, _three(grid), code.threads, code.shared, *self._arguments(args))

    def function(self, grid: tuple[int, ...], args: tuple[Argument, ...]) -> Function:
        """Return what the driver is told at such a launch, which has been made before."""
        code = self._code
        return self._module.function(code.name, _three(grid), code.threads, code.shared, self._arguments(args))

    def _arguments(self, args: tuple[Argument, ...]) -> tuple[Argument, ...]:
        return *(arg for arg, taken in zip(args, self._code.taken, strict=False) if taken), *self._scratch


def _load(kernel: Any, device: torch.device, args: tuple[Argument, ...], constants: dict[str, Any]) -> _Loaded | None:
    """Return a kernel for such arguments on a device. None for one whose launch needs more than blocks, threads, arguments."""
    key = triton_code.key_of(kernel, args, constants)
    place = kernel, device.index, key
    if place not in _loaded:
        ahead.wait(kernel, args, constants)
        code = triton_code.of(kernel, args, constants, capability(device))
        _loaded[place] = None if code is None else _load_code(code, device.index)
    return _loaded[place]


def _load_code(code: triton_code.Code, index: int) -> _Loaded | None:
    module = cuda_module.Module(code.cubin, index, int32=True)
    scratch = len(module.parameter_sizes(code.name)) - sum(code.taken)
    return _Loaded(code, module, scratch) if 0 <= scratch <= 2 else None


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
