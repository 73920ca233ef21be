"""The stamp of a passed full parity run in the user's cache: which backend was judged, with which sources, on which machine.

A stamp holds for one backend and dtype, for the sources of `fused`, `reference` and `harness` byte for byte, and for the GPU,
driver, torch, triton and NVRTC of the run. Its file is validation/<hash of all those>.json in the cache folder. The harness
writes it, and `validation` reads it.
"""

import ctypes
import hashlib
import importlib.metadata
import importlib.util
import json
import logging
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import torch

from fused import backends
from fused.io.atomic_write import atomic_write
from fused.runtime.cache_folder import cache_folder
from fused.runtime.dtypes import dtype_name

SOURCES = (".py", ".cu", ".cuh", ".h", ".hpp", ".cpp")
KEY = ("backend", "dtype", "fused", "reference", "harness", "gpu", "driver", "torch", "triton", "nvrtc")

_log = logging.getLogger("fused")


@dataclass(frozen=True)
class Validation:
    """One passed parity run: the fields of `KEY` for which it holds (None for a part that is absent), then the run itself."""

    backend: str
    dtype: str
    fused: str | None
    reference: str | None
    harness: str | None
    gpu: str
    driver: str | None
    torch: str
    triton: str | None
    nvrtc: str | None
    run: str
    date: str
    checks: tuple[str, ...]


def fingerprint(package: str) -> str | None:
    """Return the sha256 of the names and bytes of a package's sources (Python and kernels); None if there is no such package.

    The package is found, not imported.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return None
    digest = hashlib.sha256()
    for root in map(Path, sorted(spec.submodule_search_locations)):
        for path in sorted(p for p in root.rglob("*") if p.suffix in SOURCES):
            content = path.read_bytes()
            digest.update(f"{path.relative_to(root).as_posix()}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


def key(backend: str = "auto", dtype: torch.dtype = torch.float32, device: torch.device | str | None = None) -> dict:
    """Return the fields of `KEY` for this machine and these sources; `device` defaults to CUDA where there is one.

    Raises ValueError for an unknown backend, BackendError for one that cannot run on the device.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    cuda = device.type == "cuda"
    return {
        "backend": backends.choose(backend, device),
        "dtype": dtype_name(dtype),
        **{package: fingerprint(package) for package in ("fused", "reference", "harness")},
        "gpu": torch.cuda.get_device_name(device) if cuda else device.type.upper(),
        "driver": driver() if cuda else None,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "nvrtc": _version("nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu13", "nvidia-cuda-nvrtc-cu12") if cuda else None,
    }


def validation(
    backend: str = "auto", dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
) -> Validation | None:
    """Return the stamp of a backend and a dtype for this machine and these sources, None if there is none.

    `device` defaults to CUDA where there is one. Raises ValueError for an unknown backend, BackendError for one that cannot run
    on the device.
    """
    wanted = key(backend, dtype, device)
    try:
        stored = json.loads(_path(wanted).read_text())
        stamp = Validation(**{**stored, "checks": tuple(stored["checks"])})
    except (OSError, ValueError, KeyError, TypeError):  # there is none, or it cannot be read
        return None
    return stamp if all(getattr(stamp, name) == wanted[name] for name in KEY) else None


def write_validation(stamp: Validation) -> Path:
    """Write the stamp atomically, over an older one, and return its path."""
    path = _path(asdict(stamp))
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as draft:
        draft.write_text(json.dumps(asdict(stamp), indent=1) + "\n")
    return path


@cache
def remind(backend: str, dtype: torch.dtype, device: torch.device | str) -> None:
    """On CUDA, log once per process at INFO level that no stamp validates this backend and dtype on this machine."""
    listened = _log.isEnabledFor(logging.INFO)  # else a first forward need not wait for sources and driver to be read
    if listened and torch.device(device).type == "cuda" and validation(backend, dtype, device) is None:
        _log.info("backend %r in %s is not validated on this machine: run `nox -s parity`", backend, dtype)


def _path(values: dict) -> Path:
    """Return the path of the stamp for the fields of `KEY` in `values`."""
    name = hashlib.sha256(json.dumps([values[field] for field in KEY]).encode()).hexdigest()[:32]
    return cache_folder("validation") / f"{name}.json"


def _version(*distributions: str) -> str | None:
    """Return the version of the first of these distributions that is installed, None if none is."""
    for name in distributions:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def driver() -> str | None:
    """Return the NVIDIA driver's version from its management library, None without the library."""
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    buffer = ctypes.create_string_buffer(96)
    failed = library.nvmlInit_v2() or library.nvmlSystemGetDriverVersion(buffer, len(buffer))
    return None if failed else buffer.value.decode()
