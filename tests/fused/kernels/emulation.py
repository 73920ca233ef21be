"""CUDA C++ on the CPU: the source that NVRTC compiles for a GPU, compiled by g++ against `emulation.h`.

`module` and `Module.launch` have the signatures of `fused.kernels.nvrtc`, so that a test replaces the one by the other:

    monkeypatch.setattr("fused.kernels.nvrtc.module", emulation.module)

The environment's EMULATION_ORDER is the order in which the threads of a block run between barriers: `forward` (the default),
`reverse`, `random` or `random:SEED`. Results must not depend on it; where they do, a barrier is missing.
"""

import ctypes
import functools
import hashlib
import os
import re
import shutil
import struct
import subprocess
import tempfile
from pathlib import Path

import torch

HEADER = Path(__file__).with_name("emulation.h")
ORDERS = ("forward", "reverse", "random")
# -O1 compiles twice as fast as -O2 and runs nearly as fast; the checks trap (SIGILL), which the header turns into an error.
FLAGS = (
    "-std=c++20 -O1 -g1 -w -fPIC -shared -fvisibility=hidden -fno-gnu-unique -fno-strict-aliasing -ffp-contract=off "
    "-fsanitize=alignment,bounds -fsanitize-undefined-trap-on-error -U_FORTIFY_SOURCE -DEMULATED"
).split()
KERNEL = re.compile(
    r'extern\s+"C"\s+__global__\s+void\s+(?:__launch_bounds__\s*\((?P<bounds>(?:[^()]|\((?:[^()]|\([^()]*\))*\))*)\)\s*)?(?P<name>\w+)\s*\('
)


class EmulationError(RuntimeError):
    """A kernel did on the CPU what it must not do on a GPU; the message says which thread of which block, and what."""


class Module:
    """The kernels of one source, compiled for the CPU."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        self._path = library

    def launch(
        self,
        name: str,
        grid: tuple[int, int, int],
        threads: int,
        shared: int,
        *args: torch.Tensor | int | float | None,
        order: str | None = None,
    ) -> None:
        """Run a kernel: `threads` a block, `shared` bytes of dynamic shared memory; returns when all blocks have run.

        Arguments are CPU tensors (their first element's address), None (a null pointer), int (long long) and float (float32).
        Raises TypeError if they are not what the kernel takes, EmulationError if the kernel does what it must not.
        """
        kinds, run = self._kernel(name)
        if len(args) != len(kinds):
            raise TypeError(f"{name} takes {len(kinds)} arguments, got {len(args)}")
        words = b"".join(_word(name, i, kind, arg) for i, (kind, arg) in enumerate(zip(kinds, args, strict=True)))
        chosen, _, seed = (order or os.environ.get("EMULATION_ORDER") or "forward").partition(":")
        if chosen not in ORDERS:
            raise ValueError(f"order must be one of {', '.join(ORDERS)}, got {chosen!r}")
        said = ctypes.create_string_buffer(1200)
        numbers = (ctypes.c_uint * 3)(*grid)
        if run(numbers, threads, shared, words, ORDERS.index(chosen), int(seed or 0), said, len(said)):
            raise EmulationError(f"{name}{tuple(grid)}: {said.value.decode(errors='replace')}")

    @functools.cache  # noqa: B019: modules live as long as the process
    def _kernel(self, name: str):
        """Its parameters, one letter each (p pointer, i long long, f float), and what runs it."""
        try:
            run, parameters = self._library[f"emulation_run_{name}"], self._library[f"emulation_parameters_{name}"]
        except AttributeError:
            raise ValueError(f"there is no kernel {name!r} in {self._path}") from None
        parameters.restype = ctypes.c_char_p
        run.argtypes = [
            ctypes.POINTER(ctypes.c_uint),
            ctypes.c_int,
            ctypes.c_size_t,
            ctypes.c_char_p,
            ctypes.c_int,
            ctypes.c_uint64,
            ctypes.c_char_p,
            ctypes.c_size_t,
        ]
        return parameters().decode(), run


def unavailable() -> str | None:
    """None if kernels can be emulated here, else why not."""
    return None if shutil.which("g++") else "emulating CUDA kernels needs g++: install it (`apt install g++`)"


@functools.cache
def module(source: str, defines: tuple[tuple[str, int], ...] = (), device: torch.device | None = None) -> Module:
    """Compile `source` with the macros `defines`; the library is kept on disk. Raises EmulationError with g++'s words."""
    reason = unavailable()
    if reason:
        raise EmulationError(reason)
    macros = [f"-D{name}={value}" for name, value in defines]
    key = hashlib.sha256(repr((source, macros, HEADER.read_text(), FLAGS, _version())).encode()).hexdigest()[:32]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "videomamba-bench" / "emulated"
    library = folder / f"{key}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as work:
            _build(source, macros, Path(work)).replace(library)
    return Module(library)


def _build(source: str, macros: list[str], work: Path) -> Path:
    text, library = work / "kernel.cu", work / "kernel.so"
    text.write_text(source)
    plain = _gcc("-E", "-P", "-DEMULATED", *macros, "-x", "c++", text)  # without the header: __global__ is still there
    kernels = [(found["name"], found["bounds"] or "1024") for found in KERNEL.finditer(plain)]
    if not kernels:
        raise EmulationError('there is no kernel in the source: extern "C" __global__ void name(...)')
    exports = "".join(f"\nEMULATION_EXPORT({name}, {bounds})" for name, bounds in kernels)
    text.write_text(source + exports + "\n")
    _gcc(*FLAGS, *macros, "-include", HEADER, "-x", "c++", text, "-o", library)
    return library


def _gcc(*arguments: str | Path) -> str:
    done = subprocess.run(["g++", *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        raise EmulationError("g++ does not compile the kernels:\n" + "\n".join(done.stderr.splitlines()[:20]))
    return done.stdout


@functools.cache
def _version() -> str:
    return _gcc("--version").splitlines()[0]


def _word(kernel: str, index: int, kind: str, arg: torch.Tensor | int | float | None) -> bytes:
    """One argument in eight bytes, as the kernel's parameter has it."""
    if kind == "p" and (arg is None or isinstance(arg, torch.Tensor)):
        if arg is not None and arg.device.type != "cpu":
            raise TypeError(f"{kernel}: argument {index} must be on the CPU, is on {arg.device}")
        return struct.pack("Q", 0 if arg is None else arg.data_ptr())
    if kind == "i" and isinstance(arg, int):
        return struct.pack("q", arg)
    if kind == "f" and isinstance(arg, float):
        return struct.pack("fxxxx", arg)
    wanted = {"p": "a tensor or None", "i": "an int", "f": "a float"}[kind]
    raise TypeError(f"{kernel}: argument {index} must be {wanted}, got {type(arg).__name__}")
