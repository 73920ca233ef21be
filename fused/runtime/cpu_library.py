"""The kernels for CPUs: C++ that the system's compiler compiles at their first use, as one shared library.

The sources are `cpu_kernel.h` and the `cpu.cpp` of every operator. The library is kept in the user's cache folder under a name
made from the sources, the flags, the C library and the CPU, whose own instructions it uses; another CPU has a library of its
own. A file ends with a SHA-256 digest of what is before it, and is written to a draft and renamed; one whose digest does not
fit is compiled again. If the folder cannot be written, or nothing can be loaded from it, every process compiles its own.

Kernels run in the threads of the OpenMP that PyTorch uses: those of a second one would wait for the same cores.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import struct
import subprocess
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch

from fused.errors import BackendError
from fused.io.atomic_write import atomic_write
from fused.runtime import cubin_cache
from fused.runtime.cache_folder import cache_folder
from fused.runtime.memory import keep_freed_memory

COMPILERS = ("g++", "c++", "clang++")
FLAGS = (
    "-std=c++17", "-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-fno-exceptions",
    "-fno-rtti", "-fPIC", "-shared", "-x", "c++",
)  # fmt: skip
DTYPES = {torch.float32: "float", torch.float64: "double"}
"""The dtypes that kernels compute in, and their names in those of the functions."""
_DIGEST_BYTES = 32
_PLAIN = (int, bool)
_PACKAGE = Path(__file__).parents[1]

_log = logging.getLogger("fused")
_lock = threading.Lock()


class CompilerError(Exception):
    """The error for kernels that are not compiled; the message is the reason."""


@functools.cache
def source() -> str:
    """Return the C++ source of all kernels."""
    files = [_PACKAGE / "runtime" / "cpu_kernel.h", *sorted(_PACKAGE.glob("ops/*/cpu.cpp"))]
    return "\n".join(file.read_text(encoding="utf-8") for file in files)


def compiler() -> list[str] | None:
    """Return the command of the C++ compiler: CXX of the environment, such as "ccache g++", else the first of COMPILERS.

    None if there is no such program.
    """
    wanted = os.environ.get("CXX", "").split()
    if wanted:
        return wanted if shutil.which(wanted[0]) else None
    return next(([program] for program in map(shutil.which, COMPILERS) if program), None)


def path() -> Path:
    """Return the file of the library; it may not exist yet."""
    key = repr((source(), FLAGS, _c_library(), _cpu()))
    return cache_folder("cpu") / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.so"


def unavailable() -> str | None:
    """Return None if the kernels can be called, else one sentence: the reason, and what to do. Compiles them if need be."""
    reason = _load()
    return reason if isinstance(reason, str) else None


def call(name: str, dtype: torch.dtype, *structs: tuple[Any, ...]) -> None:
    """Call a kernel for a dtype of DTYPES, with structs of 8-byte members: integers, and tensors or None for pointers.

    Raises BackendError if the kernels cannot be called.
    """
    packed = [
        struct.pack(f"{len(members)}q", *[x if type(x) in _PLAIN else x.data_ptr() if x is not None else 0 for x in members])
        for members in structs
    ]
    _function(name, dtype)(*packed)


@functools.cache
def _function(name: str, dtype: torch.dtype) -> Any:
    loaded = _load()
    if isinstance(loaded, str):
        raise BackendError(f"kernels for the CPU cannot run here. {loaded}")
    function = getattr(loaded, f"{name}_{DTYPES[dtype]}")
    function.restype = None
    return function


def _load() -> ctypes.CDLL | str:
    """Return the library, compiled and loaded once a process, or why there is none."""
    with _lock:
        return _load_once()


@functools.cache
def _load_once() -> ctypes.CDLL | str:
    threads = _parallel_region()
    if threads is None:
        return "PyTorch's OpenMP has no GOMP_parallel: use a build of PyTorch with OpenMP, or backend='torch'."
    try:
        file = path()
        library = _load_kept(file) or _compile_and_load(file)
    except CompilerError as error:
        return f"{error}: install a C++ compiler such as g++, or use backend='torch'."
    except OSError as error:
        return f"the library of the kernels cannot be written or loaded ({error}): use backend='torch'."
    library.set_parallel_region(threads)
    keep_freed_memory()
    return library


def _load_kept(file: Path) -> ctypes.CDLL | None:
    """Return the library in `file`, None if it is missing or damaged, or if its file system lets no code be run."""
    try:
        return ctypes.CDLL(str(file)) if _is_whole(file) else None
    except OSError:
        return None


def _compile_and_load(file: Path) -> ctypes.CDLL:
    """Return the library, compiled, and kept in `file` if its folder can be written."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / file.name
        _compile(made)
        content = made.read_bytes()
        made.write_bytes(content + hashlib.sha256(content).digest())
        _log.info("kernels for the CPU were compiled in %.1f s, once for this machine", time.monotonic() - started)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(file) as draft:
                shutil.copyfile(made, draft)
            return ctypes.CDLL(str(file))
        except OSError as error:
            cubin_cache.warn_once(str(file.parent), str(error))
            return ctypes.CDLL(str(made))


def _compile(out: Path) -> None:
    """Write the library. Raises CompilerError if there is no compiler or it fails."""
    program, wanted = compiler(), os.environ.get("CXX")
    if program is None:
        named = f" named {wanted}, as CXX in the environment says" if wanted else ""
        raise CompilerError(f"there is no C++ compiler{named}")
    command = [*program, *FLAGS, "-", "-o", str(out)]
    done = subprocess.run(command, input=source(), capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        first = next((line for line in done.stderr.splitlines() if "error" in line), f"exit code {done.returncode}")
        raise CompilerError(f"{' '.join(program)} cannot compile the kernels for the CPU ({first.strip()})")


def _is_whole(file: Path) -> bool:
    """Return whether the file is there, with the digest of what is before it."""
    try:
        content = file.read_bytes()
    except OSError:
        return False
    return len(content) > _DIGEST_BYTES and hashlib.sha256(content[:-_DIGEST_BYTES]).digest() == content[-_DIGEST_BYTES:]


def _parallel_region() -> Any:
    """Return GOMP_parallel of the OpenMP that PyTorch has loaded, None if it has none."""
    libraries: list[str | None] = [None]  # what is loaded for all, in which PyTorch's own are
    if os.path.exists("/proc/self/maps"):
        with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as maps:
            mapped = (line.split(maxsplit=5)[-1].strip() for line in maps)
            libraries += sorted({file for file in mapped if "/lib" in file and "omp" in os.path.basename(file)})
    for library in libraries:
        try:
            return ctypes.cast(ctypes.CDLL(library).GOMP_parallel, ctypes.c_void_p)
        except (AttributeError, OSError):
            continue
    return None


def _c_library() -> str | None:
    """Return name and version of the C library, with which containers may differ that share a home; None where unknown."""
    try:
        return os.confstr("CS_GNU_LIBC_VERSION")
    except (AttributeError, ValueError, OSError):
        return None


def _cpu() -> tuple[str, ...]:
    """Return what this CPU is and can do, by which the compiler chooses instructions."""
    wanted = ("model name", "flags", "CPU part", "Features")
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            first = file.read().split("\n\n")[0]
    except OSError:
        return platform.machine(), platform.processor(), platform.node()  # not Linux: no more is known, so each host its own
    return platform.machine(), *(line for line in first.splitlines() if line.split("\t")[0].strip() in wanted)
