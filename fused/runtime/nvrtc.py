"""CUDA C++ compiled at first use: no toolkit, no headers, nothing built at install.

NVRTC, which comes with PyTorch's CUDA build, makes the machine code; the driver loads it into PyTorch's own context of the
device. Both are reached through cuda-bindings, imported at the first call. Machine code is kept on disk (`cubins.py`).
A kernel is `extern "C" __global__ void` and takes pointers, `long long` and `float` only; the same source runs on a CPU,
and tests/fused/runtime/emulation.h says what it keeps to for that.
"""

import ctypes
import functools
import importlib
import re
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused.errors import BackendError
from fused.runtime import cubin_cache as cubins

OLDEST = (8, 0)  # compute capability: bfloat16 and asynchronous copies
UNASKED = 48 << 10  # bytes of dynamic shared memory that a block may have without asking
Defines = tuple[tuple[str, int], ...]


class KernelError(RuntimeError):
    """Source that does not compile, or a call that the driver refuses; the message has the compiler's or driver's words."""


class Resources(NamedTuple):
    """What a kernel takes: registers a thread, bytes of static shared memory a block, of spills and of stack a thread."""

    registers: int
    shared: int
    spills: int
    stack: int


def unavailable(device: torch.device | str) -> str | None:
    """None if kernels can be compiled for and run on `device`, else one sentence: why not, and what to install."""
    device = torch.device(device)
    if device.type != "cuda":
        return f"CUDA kernels run on NVIDIA GPUs only and the input is on {device.type}: move it to a GPU."
    if not torch.cuda.is_available() or not torch.version.cuda:
        return "PyTorch sees no NVIDIA GPU: install PyTorch's CUDA build, and the driver."
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST:
        return f"{torch.cuda.get_device_name(device)} is sm_{capability[0]}{capability[1]}; the kernels need sm_80 or newer."
    return missing()


@functools.cache
def missing() -> str | None:
    """None if NVRTC can be reached, else why not and what to install; needs no GPU."""
    try:
        _bindings("driver")
        _bindings("nvrtc").nvrtcVersion()
    except Exception as error:  # whatever keeps a package or a shared library from loading
        said = f"{type(error).__name__}: {error}".splitlines()[0]
        major = (torch.version.cuda or "13").split(".")[0]  # of the packages, the one that fits PyTorch's own CUDA
        wheel = "nvidia-cuda-nvrtc" + ("-cu12" if major == "12" else "")
        return f'NVRTC cannot be used ({said}): pip install "cuda-bindings=={major}.*" "{wheel}=={major}.*"'
    return None


def compile(source: str, defines: Defines, arch: str) -> bytes:
    """Machine code of `source` with the macros `defines` for `arch` ("sm_80", "sm_90", "sm_100"); needs no GPU.

    Raises KernelError with NVRTC's first lines and the macros, BackendError where there is no NVRTC.
    """
    return _compile(source, defines, arch)[0]


def resources(source: str, defines: Defines, arch: str) -> dict[str, Resources]:
    """What each kernel of `source` takes on `arch`, as the assembler reports it; needs no GPU. Raises as `compile`."""
    log = _compile(source, defines, arch, "--ptxas-options=-v")[1]
    found = {}
    for part in log.split("Compiling entry function '")[1:]:
        counts = {what: int(count) for count, what in re.findall(r"(\d+) (?:bytes )?(registers|smem|stack|spill \w+)", part)}
        spills = counts.get("spill stores", 0) + counts.get("spill loads", 0)
        found[part.split("'")[0]] = Resources(counts["registers"], counts.get("smem", 0), spills, counts.get("stack", 0))
    return found


def module(source: str, defines: Defines, device: torch.device) -> "Module":
    """The kernels of `source`, compiled with the macros `defines` and loaded on `device`: made once a process.

    Raises BackendError where kernels cannot run, KernelError where the source does not compile or load.
    """
    index = torch.cuda.current_device() if device.type == "cuda" and device.index is None else device.index
    key = (source, defines, device.type, index)
    found = _modules.get(key)
    if found is None:
        with _making:  # two threads that come at once share one
            found = _modules.get(key) or _modules.setdefault(key, _make(source, defines, torch.device(device.type, index)))
    return found


class Module:
    """Kernels loaded on one device."""

    def __init__(self, code: bytes, index: int) -> None:
        """Load machine code into PyTorch's context of device `index`. Raises KernelError with the driver's words."""
        self.index = index
        self._driver = _bindings("driver")
        self._start = self._driver.cuLaunchKernel
        self._kernels: dict[str, _Kernel] = {}
        self._ask(self._driver.cuInit(0), "there is no driver")
        self._context = self._ask(self._driver.cuDevicePrimaryCtxRetain(index), f"there is no context of cuda:{index}")
        with self._current():
            self._module = self._ask(self._driver.cuModuleLoadData(code), f"kernels do not load on cuda:{index}")

    def launch(
        self, name: str, grid: tuple[int, int, int], threads: int, shared: int, *args: Tensor | int | float | None
    ) -> None:
        """Queue a kernel on PyTorch's current stream of the device: `threads` a block, `shared` bytes of dynamic memory.

        Arguments are tensors on the device (the address of the first element), None (a null pointer), int (`long long`) and
        float (`float`, rounded). Raises TypeError where their number or kind is not the kernel's, KernelError where the
        driver refuses. May be captured into a CUDA graph.
        """
        kernel = self._kernels.get(name) or self._find(name, args)
        words = self._words(name, kernel, args)
        if shared > kernel.shared:
            self._allow(name, kernel, shared)
        memory = kernel.memory
        memory.pack(memory.words, 0, *words)
        start = (kernel.function, *grid, threads, 1, 1, shared, _stream(self.index), memory.pointers, 0)
        if torch.cuda.current_device() == self.index:
            result = self._start(*start)
        else:
            with torch.cuda.device(self.index):
                result = self._start(*start)
        if result[0] != 0:
            if result[0] == self._driver.CUresult.CUDA_ERROR_INVALID_CONTEXT:  # a thread that has not used the device yet
                self._ask(self._driver.cuCtxSetCurrent(self._context), "no context")
                result = self._start(*start)
            self._ask(result, f"{name} does not start with grid {grid}, {threads} threads, {shared} bytes of shared memory")

    def _words(self, name: str, kernel: "_Kernel", args: tuple[Tensor | int | float | None, ...]) -> list[int]:
        """Eight bytes for each argument, checked as far as the driver tells what the kernel takes."""
        sizes, index, words = kernel.sizes, self.index, []
        if len(args) != len(sizes):
            raise TypeError(f"{name} takes {len(sizes)} arguments, got {len(args)}")
        for arg, size in zip(args, sizes, strict=True):  # the common kinds first: a launch has some twenty arguments
            if size == 4 and isinstance(arg, float):
                words.append(_WORD.unpack(_FLOAT.pack(arg))[0])
            elif size == 8 and type(arg) is int:
                words.append(arg)
            elif size == 8 and arg is None:
                words.append(0)
            elif size == 8 and isinstance(arg, Tensor):
                if arg.get_device() != index:
                    raise TypeError(f"{name}: argument {len(words)} must be on cuda:{index}, is on {arg.device}")
                words.append(arg.data_ptr())
            else:
                wanted = "a float" if size == 4 else "a tensor, None or an int"
                raise TypeError(f"{name}: argument {len(words)} must be {wanted}, got {type(arg).__name__}")
        return words

    def _find(self, name: str, args: tuple[object, ...]) -> "_Kernel":
        driver = self._driver
        with _making, self._current():
            function = self._ask(driver.cuModuleGetFunction(self._module, name.encode()), f"there is no kernel {name!r}")
            # Asking anything of a function loads it, which otherwise its first launch does: too late in a captured graph.
            registers = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_NUM_REGS
            self._ask(driver.cuFuncGetAttribute(registers, function), name)
            sizes: list[int] = []
            while True:
                error, _, size = driver.cuFuncGetParamInfo(function, len(sizes))
                if error != 0:  # there is no such parameter
                    break
                sizes.append(size)
        if not sizes:  # a driver before 12.4 does not tell: what comes first is right
            sizes = [4 if isinstance(arg, float) else 8 for arg in args]
        return self._kernels.setdefault(name, _Kernel(function, sizes))

    def _allow(self, name: str, kernel: "_Kernel", shared: int) -> None:
        driver = self._driver
        limit = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        with self._current():
            self._ask(
                driver.cuFuncSetAttribute(kernel.function, limit, shared), f"{name} cannot have {shared} bytes of shared memory"
            )
        kernel.shared = shared

    @contextmanager
    def _current(self) -> Iterator[None]:
        """PyTorch's context of the device, and loading allowed to this thread even while it captures a graph."""
        driver = self._driver
        relaxed = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
        before = self._ask(driver.cuThreadExchangeStreamCaptureMode(relaxed), "capture mode")
        self._ask(driver.cuCtxPushCurrent(self._context), "context")
        try:
            yield
        finally:
            self._ask(driver.cuCtxPopCurrent(), "context")
            self._ask(driver.cuThreadExchangeStreamCaptureMode(before), "capture mode")

    def _ask(self, result: tuple[Any, ...], what: str) -> Any:
        """What a driver call gave; raises KernelError if it failed."""
        if result[0] != 0:
            error, text = self._driver.cuGetErrorString(result[0])
            raise KernelError(f"{what}: {result[0].name}" + (f", {text.decode()}" if error == 0 else ""))
        return result[1] if len(result) > 1 else None


class _Kernel:
    """A loaded function, the sizes of its parameters, and how much dynamic shared memory it has been allowed."""

    def __init__(self, function: Any, sizes: list[int]) -> None:
        self.function, self.sizes, self.shared = function, sizes, UNASKED
        self.memory = _Memory(len(sizes))


class _Memory(threading.local):
    """A thread's own place for arguments on their way to the driver, which copies them before a launch returns."""

    def __init__(self, count: int) -> None:
        self.words = (ctypes.c_int64 * count)()
        self.pack = struct.Struct(f"{count}q").pack_into
        first = ctypes.addressof(self.words)
        self._addresses = (ctypes.c_void_p * count)(*range(first, first + 8 * count, 8))
        self.pointers = ctypes.addressof(self._addresses)


_FLOAT, _WORD = struct.Struct("f4x"), struct.Struct("q")
_modules: dict[tuple[str, Defines, str, int | None], Module] = {}
_making = threading.RLock()


@functools.cache
def _bindings(name: str) -> Any:
    return importlib.import_module(f"cuda.bindings.{name}")


def _make(source: str, defines: Defines, device: torch.device) -> Module:
    reason = unavailable(device)
    if reason:
        raise BackendError(reason)
    arch = "sm_{}{}".format(*torch.cuda.get_device_capability(device))
    versions = (_bindings("nvrtc").nvrtcVersion()[1:], _bindings("driver").cuDriverGetVersion()[1])
    code = cubins.kept((source, defines, arch, versions), lambda: compile(source, defines, arch))
    return Module(code, device.index)


def _compile(source: str, defines: Defines, arch: str, *more: str) -> tuple[bytes, str]:
    """Machine code, and what NVRTC said."""
    reason = missing()
    if reason:
        raise BackendError(reason)
    nvrtc = _bindings("nvrtc")
    options = ["--std=c++17", f"--gpu-architecture={arch}", *more, *(f"-D{name}={value}" for name, value in defines)]
    _, program = nvrtc.nvrtcCreateProgram(source.encode(), b"kernels.cu", 0, [], [])
    try:
        (error,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
        log = _text(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program).decode(errors="replace").strip("\0\n ")
        if error != 0:
            lines = log.splitlines()
            said = "\n".join(lines[:20] + [f"... and {len(lines) - 20} lines more"] * (len(lines) > 20))
            macros = " ".join(f"{name}={value}" for name, value in defines) or "no macros"
            raise KernelError(f"kernels do not compile for {arch} with {macros}: {error.name}\n{said}")
        return _text(nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN, program), log
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _text(size: Any, read: Any, program: Any) -> bytes:
    """What NVRTC writes into memory that the caller provides."""
    memory = bytearray(size(program)[1])
    read(program, memory)
    return bytes(memory)


def _stream(index: int) -> int:
    """The handle of PyTorch's current stream; by the call that Triton uses, ten times as fast as the public one."""
    raw = getattr(torch._C, "_cuda_getCurrentRawStream", None)
    return raw(index) if raw else torch.cuda.current_stream(index).cuda_stream
