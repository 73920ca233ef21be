"""CUDA C++ on the CPU: the source that NVRTC compiles for a GPU, compiled by g++ against `emulation.h`.

`module` and `Module.launch` have the signatures of `fused.runtime.nvrtc`, so that a test replaces the one by the other:

    monkeypatch.setattr("fused.runtime.nvrtc.module", emulation.module)

The environment's EMULATION_ORDER is the order in which the threads of a block run between barriers: `forward` (the default),
`reverse`, `random` or `random:SEED`. Results must not depend on it; where they do, a barrier is missing.
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

import torch

Argument = torch.Tensor | int | float | None
HERE = Path(__file__).parent
ORDERS = ("forward", "reverse", "random")
# -O1 compiles fast and runs nearly as fast as -O2. The checks end in a trap, which the header makes an error.
FLAGS = (
    "-std=c++20 -O1 -g1 -w -fPIC -shared -fvisibility=hidden -fno-gnu-unique -fno-strict-aliasing -ffp-contract=off "
    "-fsanitize=alignment,bounds -fsanitize-undefined-trap-on-error -U_FORTIFY_SOURCE -DEMULATED"
).split()
UNSET = "-ftrivial-auto-var-init=pattern"  # from g++ 12 on: a variable that nobody set is -1.7e38, not by chance zero
_BOUNDS = r"(?:__launch_bounds__\s*\((?P<bounds{}>(?:[^()]|\((?:[^()]|\([^()]*\))*\))*)\)\s*)?"  # before void or behind it
KERNEL = re.compile(
    r"extern\s+\"C\"\s+__global__\s+" + _BOUNDS.format(1) + r"void\s+" + _BOUNDS.format(2) + r"(?P<name>\w+)\s*\("
)
_one, _memory = threading.Lock(), ctypes.c_void_p()  # one grid runs at a time; what all libraries use
# The example at the top of emulation.h, so that it is one that works.
_COMMENT = (HERE / "emulation.h").read_text().split("Example:\n//\n")[1].split("#pragma once")[0]
EXAMPLE = textwrap.dedent(_COMMENT.replace("//   ", "   "))


class EmulationError(RuntimeError):
    """A kernel did on the CPU what it must not do on a GPU; the message says which thread of which block, and what."""


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
        """Run a kernel: `threads` a block, `shared` bytes of dynamic shared memory; returns when all blocks have run.

        Arguments are CPU tensors (the address of the first element), None (a null pointer), int (`long long`) and float
        (`float`, rounded). Raises TypeError where their number or kind is not the kernel's, EmulationError where there is
        no such kernel or it does what it must not.
        """
        kinds, run = self._kernels.get(name) or self._find(name)
        if len(args) != len(kinds):
            raise TypeError(f"{name} takes {len(kinds)} arguments, got {len(args)}")
        words = b"".join(_word(name, i, kind, arg) for i, (kind, arg) in enumerate(zip(kinds, args, strict=True)))
        chosen, _, seed = (order or os.environ.get("EMULATION_ORDER") or "forward").partition(":")
        if chosen not in ORDERS:
            raise ValueError(f"order must be one of {', '.join(ORDERS)}, got {chosen!r}")
        said, how = ctypes.create_string_buffer(1200), (ORDERS.index(chosen), int(seed or 0))
        with _one:
            failed = run((ctypes.c_uint * 3)(*grid), threads, shared, words, *how, ctypes.byref(_memory), said, len(said))
        if failed:
            message = re.sub(r" \[pc (0x\w+)\]", self._line, said.value.decode(errors="replace"))
            raise EmulationError(f"{name} with grid {tuple(grid)}: {message}")

    def _find(self, name: str) -> tuple[str, Callable[..., int]]:
        """The kernel's parameters, one letter each (p pointer, i long long, f float), and what runs it."""
        try:
            parameters, run = self._library[f"emulation_parameters_{name}"], self._library[f"emulation_run_{name}"]
        except AttributeError:
            raise EmulationError(f"there is no kernel {name!r}") from None
        parameters.restype = ctypes.c_char_p
        grid, number, size, text = ctypes.POINTER(ctypes.c_uint), ctypes.c_int, ctypes.c_size_t, ctypes.c_char_p
        run.argtypes = (grid, number, size, text, number, ctypes.c_uint64, ctypes.c_void_p, text, size)
        self._kernels[name] = parameters().decode(), run
        return self._kernels[name]

    def _line(self, place: re.Match[str]) -> str:
        """Which line of the source an address of the library belongs to, said as well as binutils can."""
        if not shutil.which("addr2line"):
            return ""
        command = ["addr2line", "-i", "-e", str(self._path), place[1]]
        frames = subprocess.run(command, capture_output=True, text=True).stdout
        found = re.search(r"kernel\.cu:(\d+)", frames)
        return f" in line {found[1]}" if found else ""


@functools.cache
def unavailable() -> str | None:
    """None if kernels can be emulated here, else why not."""
    if sys.platform != "linux":
        return f"kernels are emulated on Linux only, this is {sys.platform}"
    return None if shutil.which("g++") else "emulating CUDA kernels needs g++: apt install g++"


@functools.cache
def module(source: str, defines: tuple[tuple[str, int], ...] = (), device: torch.device | None = None) -> Module:
    """Compile `source` with the macros `defines`; the library is kept on disk. Raises EmulationError with g++'s words."""
    reason = unavailable()
    if reason:
        raise EmulationError(reason)
    macros = [f"-D{name}={value}" for name, value in defines]
    headers = [header.read_text() for header in sorted(HERE.glob("emulation*.h"))]
    key = hashlib.sha256(repr((source, macros, headers, _flags())).encode()).hexdigest()[:32]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "videomamba-bench" / "emulated"
    library = folder / f"{key}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        _forget(folder)
        with tempfile.TemporaryDirectory(dir=folder) as work:
            os.replace(_build(source, macros, Path(work)), library)  # whole or not at all, whoever else builds it now
    return Module(library)


def fenced(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous copy behind whose end (up to alignment to 16 bytes) lies memory that nobody may touch.

    A kernel that reads or writes beyond it raises EmulationError.
    """
    size, page = tensor.numel() * tensor.element_size(), mmap.PAGESIZE
    whole = -(-size // page) * page
    memory = mmap.mmap(-1, whole + page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    if ctypes.CDLL(None).mprotect(ctypes.c_void_p(address + whole), ctypes.c_size_t(page), 0):
        raise OSError("mprotect failed")
    start = (whole - size) // 16 * 16
    flat = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=start)
    return flat.view(tensor.shape).copy_(tensor)


def _build(source: str, macros: list[str], work: Path) -> Path:
    text, library = work / "kernel.cu", work / "kernel.so"
    text.write_text(source)
    plain = _gcc("-E", "-P", "-DEMULATED", *macros, "-x", "c++", text)  # without the header: __global__ is still there
    kernels = [(found["name"], found["bounds1"] or found["bounds2"] or "1024") for found in KERNEL.finditer(plain)]
    if not kernels:
        raise EmulationError('there is no kernel in the source: extern "C" __global__ void name(...)')
    exports = "".join(f"\nEMULATION_EXPORT({name}, {bounds})" for name, bounds in kernels)
    text.write_text(source + exports + "\n")
    _gcc(*_flags()[1:], *macros, "-include", HERE / "emulation.h", "-x", "c++", text, "-o", library)
    return library


def _forget(folder: Path) -> None:
    """Sources change while they are written: libraries that are a week old go."""
    for library in folder.glob("*.so"):
        if library.stat().st_mtime < time.time() - 7 * 86400:
            library.unlink(missing_ok=True)


def _gcc(*arguments: str | Path) -> str:
    done = subprocess.run(["g++", *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        raise EmulationError("g++ does not compile the kernels:\n" + "\n".join(done.stderr.splitlines()[:20]))
    return done.stdout


@functools.cache
def _flags() -> tuple[str, ...]:
    """Which g++ this is, and the options that it takes."""
    version = _gcc("--version").splitlines()[0]
    knows = subprocess.run(["g++", UNSET, "-E", "-x", "c++", os.devnull], capture_output=True).returncode == 0
    return version, *FLAGS, *([UNSET] if knows else [])


def _word(kernel: str, index: int, kind: str, arg: Argument) -> bytes:
    """One argument in eight bytes, as the kernel's parameter has it."""
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
    wanted = {"p": "a tensor or None", "i": "an int", "f": "a float"}[kind]
    raise TypeError(f"{kernel}: argument {index} must be {wanted}, got {type(arg).__name__}")
