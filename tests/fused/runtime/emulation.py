"""Emulation of CUDA kernels on the CPU: g++ compiles the source that NVRTC compiles for a GPU, with `emulation.h`.

`module` and `Module.launch` have the signatures of `fused.runtime.nvrtc` and `cuda_module`, so that a test can replace them:

    monkeypatch.setattr("fused.runtime.nvrtc.module", emulation.module)

The environment variable EMULATION_ORDER sets the order in which the threads of a block run between barriers: `forward` (the
default), `reverse`, `random` or `random:SEED`. Results must not depend on it. If they do, a barrier is missing.
"""

import ctypes
import functools
import hashlib
import mmap
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fused import backends
from fused.runtime import nvrtc

Argument = torch.Tensor | int | float | None
HERE = Path(__file__).parent
ORDERS = ("forward", "reverse", "random")
# -O1 compiles fast and runs nearly as fast as -O2. Failed checks trap; the signal handler in the header makes an error of it.
FLAGS = (
    "-std=c++20 -O1 -g1 -w -fPIC -shared -fvisibility=hidden -fno-gnu-unique -fno-strict-aliasing -ffp-contract=off "
    "-fsanitize=alignment,bounds -fsanitize-undefined-trap-on-error -U_FORTIFY_SOURCE -DEMULATED"
).split()
INIT_LOCALS = "-ftrivial-auto-var-init=pattern"  # from g++ 12 on: uninitialized variables are -1.7e38 instead of a chance value
# Launch bounds may stand before or after void.
_BOUNDS = r"(?:__launch_bounds__\s*\((?P<bounds{}>(?:[^()]|\((?:[^()]|\([^()]*\))*\))*)\)\s*)?"
KERNEL = re.compile(
    r"extern\s+\"C\"\s+__global__\s+" + _BOUNDS.format(1) + r"void\s+" + _BOUNDS.format(2) + r"(?P<name>\w+)\s*\("
)
_launch_lock = threading.Lock()  # one grid runs at a time
_memory = ctypes.c_void_p()  # stacks and shared memory of all libraries
# The example in the comment of emulation.h, which the tests run.
_COMMENT = (HERE / "emulation.h").read_text().split("Example:\n//\n")[1].split("#pragma once")[0]
EXAMPLE = textwrap.dedent(_COMMENT.replace("//   ", "   "))


class EmulationError(RuntimeError):
    """A kernel did what is an error on a GPU. The message names the error, the block and the thread."""


class Module:
    """The kernels of one source, compiled for the CPU."""

    def __init__(self, library: Path) -> None:
        self._path = library
        self._library = ctypes.CDLL(str(library))
        self._kernels: dict[str, tuple[str, Callable[..., int]]] = {}

    def launch(
        self,
        name: str,
        grid: tuple[int, int, int],
        threads: int,
        shared: int,
        *args: Argument,
        order: str | None = None,
    ) -> None:
        """Run a kernel, `threads` a block and with `shared` bytes of dynamic shared memory; return when all blocks have run.

        Arguments are CPU tensors (the address of the first element), None (a null pointer), int (`long long`) and float
        (`float`, rounded). Raises TypeError if number or kinds of the arguments are not those of the kernel, EmulationError if
        there is no such kernel or it does what is an error on a GPU.
        """
        kinds, run = self._kernels.get(name) or self._load_kernel(name)
        if len(args) != len(kinds):
            raise TypeError(f"{name} takes {len(kinds)} arguments, got {len(args)}")
        words = b"".join(_pack_argument(name, i, kind, arg) for i, (kind, arg) in enumerate(zip(kinds, args, strict=True)))
        chosen, _, seed = (order or os.environ.get("EMULATION_ORDER") or "forward").partition(":")
        if chosen not in ORDERS:
            raise ValueError(f"order must be one of {', '.join(ORDERS)}, got {chosen!r}")
        message_buffer, order_args = ctypes.create_string_buffer(1200), (ORDERS.index(chosen), int(seed or 0))
        launch_args = ((ctypes.c_uint * 3)(*grid), threads, shared, words, *order_args)
        with _launch_lock:
            failed = run(*launch_args, ctypes.byref(_memory), message_buffer, len(message_buffer))
        if failed:
            message = re.sub(r" \[pc (0x\w+)\]", self._source_line, message_buffer.value.decode(errors="replace"))
            raise EmulationError(f"{name} with grid {tuple(grid)}: {message}")

    def _load_kernel(self, name: str) -> tuple[str, Callable[..., int]]:
        """Return the kinds of the parameters, a letter each (p pointer, i long long, f float), and the function to call."""
        try:
            parameters, run = self._library[f"emulation_parameters_{name}"], self._library[f"emulation_run_{name}"]
        except AttributeError:
            raise EmulationError(f"there is no kernel {name!r}") from None
        parameters.restype = ctypes.c_char_p
        grid, number, size, text = ctypes.POINTER(ctypes.c_uint), ctypes.c_int, ctypes.c_size_t, ctypes.c_char_p
        run.argtypes = (grid, number, size, text, number, ctypes.c_uint64, ctypes.c_void_p, text, size)
        self._kernels[name] = parameters().decode(), run
        return self._kernels[name]

    def _source_line(self, address: re.Match[str]) -> str:
        """Return " in line N" of the source for an address in the library, or nothing if binutils cannot tell."""
        if not shutil.which("addr2line"):
            return ""
        command = ["addr2line", "-i", "-e", str(self._path), address[1]]
        frames = subprocess.run(command, capture_output=True, text=True).stdout
        found = re.search(r"kernel\.cu:(\d+)", frames)
        return f" in line {found[1]}" if found else ""


@functools.cache
def unavailable() -> str | None:
    """Return None if kernels can be emulated here, else why not."""
    if sys.platform != "linux":
        return f"kernels are emulated on Linux only, this is {sys.platform}"
    return None if shutil.which("g++") else "emulating CUDA kernels needs g++: apt install g++"


def stand_in(monkeypatch: Any) -> None:
    """Let backend "native" run on the CPU in a test, which is skipped where kernels cannot be emulated."""
    if reason := unavailable():
        pytest.skip(reason)
    monkeypatch.setattr(nvrtc, "module", module)
    monkeypatch.setattr(backends, "unavailable", lambda backend, device: None)


@functools.cache
def module(source: str, defines: tuple[tuple[str, int], ...] = (), device: torch.device | None = None) -> Module:
    """Compile `source` with the macros `defines`; the library is kept on disk. Raises EmulationError with g++'s message."""
    reason = unavailable()
    if reason:
        raise EmulationError(reason)
    macros = [f"-D{name}={value}" for name, value in defines]
    headers = [header.read_text() for header in sorted(HERE.glob("emulation*.h"))]
    key = hashlib.sha256(repr((source, macros, headers, compiler_flags())).encode()).hexdigest()[:32]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "videomamba-bench" / "emulated"
    library = folder / f"{key}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        _remove_old_libraries(folder)
        with tempfile.TemporaryDirectory(dir=folder) as work:
            os.replace(_build(source, macros, Path(work)), library)  # atomic: another process may build it too
    return Module(library)


def fenced(tensor: torch.Tensor, at_end: bool = True) -> torch.Tensor:
    """Return a contiguous copy between protected pages: it ends (up to alignment to 16 bytes) at one, or begins there.

    A kernel that reads or writes beyond that end raises EmulationError.
    """
    size, page = tensor.numel() * tensor.element_size(), mmap.PAGESIZE
    padded = -(-size // page) * page
    memory = mmap.mmap(-1, padded + 2 * page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for fence in (address, address + page + padded):
        if ctypes.CDLL(None).mprotect(ctypes.c_void_p(fence), ctypes.c_size_t(page), 0):
            raise OSError("mprotect failed")
    start = page + ((padded - size) // 16 * 16 if at_end else 0)
    flat = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=start)
    return flat.view(tensor.shape).copy_(tensor)


def _build(source: str, macros: list[str], work: Path) -> Path:
    text, library = work / "kernel.cu", work / "kernel.so"
    text.write_text(source)
    plain = _gcc("-E", "-P", "-DEMULATED", *macros, "-x", "c++", text)  # without the header, which defines __global__ away
    kernels = [(found["name"], found["bounds1"] or found["bounds2"] or "1024") for found in KERNEL.finditer(plain)]
    if not kernels:
        raise EmulationError('there is no kernel in the source: extern "C" __global__ void name(...)')
    exports = "".join(f"\nEMULATION_EXPORT({name}, {bounds})" for name, bounds in kernels)
    text.write_text(source + exports + "\n")
    _gcc(*compiler_flags()[1:], *macros, "-include", HERE / "emulation.h", "-x", "c++", text, "-o", library)
    return library


def _remove_old_libraries(folder: Path) -> None:
    """Remove libraries that are a week old: every edit of a source makes a new one."""
    for library in folder.glob("*.so"):
        if library.stat().st_mtime < time.time() - 7 * 86400:
            library.unlink(missing_ok=True)


def _gcc(*arguments: str | Path) -> str:
    """Run g++ and return its output. Raises EmulationError with its first lines if it fails."""
    done = subprocess.run(["g++", *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        raise EmulationError("g++ does not compile the kernels:\n" + "\n".join(done.stderr.splitlines()[:20]))
    return done.stdout


@functools.cache
def compiler_flags() -> tuple[str, ...]:
    """Return the version of g++, then the options that it accepts."""
    version = _gcc("--version").splitlines()[0]
    accepted = subprocess.run(["g++", INIT_LOCALS, "-E", "-x", "c++", os.devnull], capture_output=True).returncode == 0
    return version, *FLAGS, *([INIT_LOCALS] if accepted else [])


def _pack_argument(kernel: str, index: int, kind: str, arg: Argument) -> bytes:
    """Return an argument as eight bytes. Raises TypeError if it is not of the parameter's kind (`_load_kernel`)."""
    if kind == "p" and isinstance(arg, torch.Tensor):
        if arg.device.type != "cpu":
            raise TypeError(f"{kernel}: argument {index} must be on the CPU, is on {arg.device}")
        return struct.pack("Q", arg.data_ptr())
    if kind == "p" and arg is None:
        return bytes(8)
    if kind == "i" and isinstance(arg, int):
        return struct.pack("q", arg)
    if kind == "f" and isinstance(arg, float):
        return struct.pack("f4x", arg)
    expected = {"p": "a tensor or None", "i": "an int", "f": "a float"}[kind]
    raise TypeError(f"{kernel}: argument {index} must be {expected}, got {type(arg).__name__}")
