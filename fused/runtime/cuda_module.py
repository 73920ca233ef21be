"""CUDA kernels loaded by the driver into PyTorch's context of a device, and their launches.

The driver is called through cuda-bindings, which is imported at the first call.
"""

import ctypes
import functools
import importlib
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fused.runtime.recording import Argument, Function

DEFAULT_DYNAMIC_SMEM = 48 << 10  # bytes of dynamic shared memory that a block may have without setting an attribute
_FLOAT, _WORD = struct.Struct("f4x"), struct.Struct("q")
_lock = threading.RLock()


class KernelError(RuntimeError):
    """Source that does not compile, or a call that the driver refuses. The message quotes the compiler or the driver."""


@functools.cache
def bindings(name: str) -> Any:
    """Return cuda.bindings.`name`. Raises ImportError if it is not installed."""
    return importlib.import_module(f"cuda.bindings.{name}")


class Module:
    """Kernels loaded on one device."""

    def __init__(self, cubin: bytes, index: int, int32: bool = False) -> None:
        """Load machine code into PyTorch's context of device `index`. Raises KernelError with the driver's message.

        With `int32`, parameters of four bytes may be integers, as Triton's kernels have them.
        """
        self.index, self._int32 = index, int32
        self._driver = bindings("driver")
        self._launch_kernel = self._driver.cuLaunchKernel
        self._kernels: dict[str, _Kernel] = {}
        self._check(self._driver.cuInit(0), "there is no driver")
        self._context = self._check(self._driver.cuDevicePrimaryCtxRetain(index), f"there is no context of cuda:{index}")
        with self._context_current():
            self._module = self._check(self._driver.cuModuleLoadData(cubin), f"kernels do not load on cuda:{index}")

    def launch(self, name: str, grid: tuple[int, int, int], threads: int, shared: int, *args: Argument) -> None:
        """Queue a kernel on PyTorch's current stream of the device. May be captured into a CUDA graph.

        Args:
            name: of the kernel.
            grid: blocks along x, y and z.
            threads: of a block.
            shared: bytes of dynamic shared memory of a block.
            args: tensors on the device (passed as the address of the first element), None (a null pointer), int (`long long`)
                and float (`float`, rounded); where the module has them, int for a parameter of four bytes too.

        Raises TypeError if number or kinds of `args` are not those of the kernel, KernelError if the driver refuses.
        """
        kernel = self._kernels.get(name) or self._load_kernel(name, args)
        words = self._pack_arguments(name, kernel, args)
        if shared > kernel.max_dynamic_smem:
            self._raise_max_dynamic_smem(name, kernel, shared)
        buffer = kernel.argument_buffer
        buffer.pack(buffer.words, 0, *words)
        launch_args = (kernel.function, *grid, threads, 1, 1, shared, current_stream(self.index), buffer.pointers, 0)
        if torch.cuda.current_device() == self.index:
            result = self._launch_kernel(*launch_args)
        else:
            with torch.cuda.device(self.index):
                result = self._launch_kernel(*launch_args)
        if result[0] != 0:
            if result[0] == self._driver.CUresult.CUDA_ERROR_INVALID_CONTEXT:  # a thread that has not used the device yet
                self._check(self._driver.cuCtxSetCurrent(self._context), "no context")
                result = self._launch_kernel(*launch_args)
            self._check(result, f"{name} does not start with grid {grid}, {threads} threads, {shared} bytes of shared memory")

    def function(
        self, name: str, grid: tuple[int, int, int], threads: int, shared: int, args: tuple[Argument, ...]
    ) -> Function:
        """Return what the driver is told at a launch with these arguments, which has been made before."""
        kernel = self._kernels[name]
        return Function(kernel.function, grid, threads, shared, args, kernel.parameter_sizes)

    def parameter_sizes(self, name: str) -> list[int]:
        """Return the bytes of each parameter of a kernel; nothing from a driver before 12.4."""
        function = self._kernels[name].function if name in self._kernels else self._get_function(name)
        return _parameter_sizes(function)

    def _pack_arguments(self, name: str, kernel: "_Kernel", args: tuple[Argument, ...]) -> list[int]:
        """Return each argument as eight bytes. Raises TypeError for arguments that cannot be those of the kernel."""
        sizes, index, words = kernel.parameter_sizes, self.index, []
        if len(args) != len(sizes):
            raise TypeError(f"{name} takes {len(sizes)} arguments, got {len(args)}")
        for arg, size in zip(args, sizes, strict=True):  # frequent types first: a launch has dozens of arguments
            if size == 4 and isinstance(arg, float):
                words.append(_WORD.unpack(_FLOAT.pack(arg))[0])
            elif type(arg) is int and (size == 8 or self._int32):
                words.append(arg)
            elif size == 8 and arg is None:
                words.append(0)
            elif size == 8 and isinstance(arg, Tensor):
                if arg.get_device() != index:
                    raise TypeError(f"{name}: argument {len(words)} must be on cuda:{index}, is on {arg.device}")
                words.append(arg.data_ptr())
            else:
                expected = "a float" if size == 4 else "a tensor, None or an int"
                raise TypeError(f"{name}: argument {len(words)} must be {expected}, got {type(arg).__name__}")
        return words

    def _get_function(self, name: str) -> Any:
        driver = self._driver
        with _lock, self._context_current():
            function = self._check(driver.cuModuleGetFunction(self._module, name.encode()), f"there is no kernel {name!r}")
            # Reading an attribute loads the function. Otherwise its first launch would, which fails while a graph is captured.
            registers = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_NUM_REGS
            self._check(driver.cuFuncGetAttribute(registers, function), name)
        return function

    def _load_kernel(self, name: str, args: tuple[Argument, ...]) -> "_Kernel":
        function = self._get_function(name)
        # a driver before 12.4 does not know: trust the arguments of the first launch
        sizes = _parameter_sizes(function) or [4 if isinstance(arg, float) else 8 for arg in args]
        return self._kernels.setdefault(name, _Kernel(function, sizes))

    def _raise_max_dynamic_smem(self, name: str, kernel: "_Kernel", shared: int) -> None:
        driver = self._driver
        limit = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        with self._context_current():
            result = driver.cuFuncSetAttribute(kernel.function, limit, shared)
            self._check(result, f"{name} cannot have {shared} bytes of shared memory")
        kernel.max_dynamic_smem = shared

    @contextmanager
    def _context_current(self) -> Iterator[None]:
        """Make PyTorch's context of the device current, and allow loading even if this thread captures a graph."""
        driver = self._driver
        relaxed = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
        mode = self._check(driver.cuThreadExchangeStreamCaptureMode(relaxed), "capture mode")
        self._check(driver.cuCtxPushCurrent(self._context), "context")
        try:
            yield
        finally:
            self._check(driver.cuCtxPopCurrent(), "context")
            self._check(driver.cuThreadExchangeStreamCaptureMode(mode), "capture mode")

    def _check(self, result: tuple[Any, ...], message: str) -> Any:
        """Return the value of a driver call (error, value). Raises KernelError with `message` if it failed."""
        if result[0] != 0:
            error, text = self._driver.cuGetErrorString(result[0])
            raise KernelError(f"{message}: {result[0].name}" + (f", {text.decode()}" if error == 0 else ""))
        return result[1] if len(result) > 1 else None


class _Kernel:
    """A loaded function, the bytes of each of its parameters, and the bytes of dynamic shared memory that it may have."""

    def __init__(self, function: Any, parameter_sizes: list[int]) -> None:
        self.function, self.parameter_sizes, self.max_dynamic_smem = function, parameter_sizes, DEFAULT_DYNAMIC_SMEM
        self.argument_buffer = _ArgumentBuffer(len(parameter_sizes))


class _ArgumentBuffer(threading.local):
    """A thread's buffer of `count` arguments. The driver copies them before a launch returns."""

    def __init__(self, count: int) -> None:
        self.words = (ctypes.c_int64 * count)()
        self.pack = struct.Struct(f"{count}q").pack_into
        first = ctypes.addressof(self.words)
        self._addresses = (ctypes.c_void_p * count)(*range(first, first + 8 * count, 8))
        self.pointers = ctypes.addressof(self._addresses)


def _parameter_sizes(function: Any) -> list[int]:
    """Return the bytes of each parameter of a kernel; nothing from a driver before 12.4."""
    sizes: list[int] = []
    while True:
        error, _, size = bindings("driver").cuFuncGetParamInfo(function, len(sizes))
        if error != 0:  # there is no such parameter
            return sizes
        sizes.append(size)


def current_stream(index: int) -> int:
    """Return the handle of PyTorch's current stream. The private call, which Triton uses too, takes a tenth of the time."""
    raw = getattr(torch._C, "_cuda_getCurrentRawStream", None)
    return raw(index) if raw else torch.cuda.current_stream(index).cuda_stream
