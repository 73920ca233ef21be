"""The box: its hardware, its packages, the code that runs on it, and whether it can judge at all."""

import importlib.metadata
import os
import platform
import subprocess
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from fused import stamp

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "triton", "mamba-ssm", "causal-conv1d", "timm", "numpy", "pandas", "matplotlib", "av", "pytest", "nox")


def describe(device: str) -> dict[str, Any]:
    """Return the description of the box on which `device` is used, as JSON types."""
    cuda = torch.cuda.is_available()
    box: dict[str, Any] = {
        "device": device,
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "driver": stamp.driver() if cuda else None,
        "cuda": torch.version.cuda,
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "fingerprints": fingerprints(),
        "git": git(),
        "settings": settings(),
    }
    if cuda:
        properties = torch.cuda.get_device_properties(0)
        box["gpu_memory_gib"] = round(properties.total_memory / 2**30, 1)
        box["multiprocessors"] = properties.multi_processor_count
    return box


def prepare() -> None:
    """Set PyTorch to the settings under which everything is judged; call before the first CUDA work."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True)


def settings() -> dict[str, Any]:
    """Return the settings in force."""
    return {
        "tf32": torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "CUBLAS_WORKSPACE_CONFIG": os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
    }


def unfit() -> list[str]:
    """Return the reasons why this box cannot judge; none if it can."""
    reasons = []
    if tuple(int(n) for n in torch.__version__.split("+")[0].split(".")[:2]) < (2, 8):
        reasons.append(f"torch is {torch.__version__}; 2.8 or newer is needed")
    for name in ("fused", "reference"):
        if imported_from(name) != ROOT / name:
            reasons.append(f"`import {name}` finds {imported_from(name)}, not {ROOT / name}; uninstall the other package")
    return reasons


def fingerprints() -> dict[str, str | None]:
    """Return the hash of the sources of each of the three packages, as they are on the disk now."""
    return {name: stamp.fingerprint(name) for name in ("reference", "fused", "harness")}


def imported_from(package: str) -> Path | None:
    """Return the folder that `import package` reads."""
    spec = find_spec(package)
    return Path(spec.origin).resolve().parent if spec and spec.origin else None


def git() -> dict[str, Any]:
    """Return the checkout's commit and whether files differ from it; None for both without git or a checkout."""

    def ask(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, timeout=20)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    status = ask("status", "--porcelain", "--", "reference", "fused", "harness")
    return {"commit": ask("rev-parse", "HEAD"), "dirty": None if status is None else bool(status)}


def _version(name: str) -> str | None:
    """Return the version of an installed distribution; None if there is none."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu() -> str:
    """Return the processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())
