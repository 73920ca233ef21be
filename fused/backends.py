"""The choice of the backend that runs an operator: by name, or by the device. A named backend is never replaced by another.

- `native`            kernels of this project: CUDA C++ for the scan, compiled at its first use, and Triton for the rest
- `native_kept`       the same, and a mixer keeps the states of its scan, so that the backward does not scan again;
                      with states and in chunks it is `native`
- `cpu`               kernels of this project for CPUs: C++, compiled at its first use; PyTorch operations where there are none
- `mamba_ssm`         mamba-ssm's CUDA scan, causal-conv1d, mamba-ssm's Triton norm
- `mamba_ssm_inner`   the same, with mamba-ssm's recomputing `mamba_inner_fn` as the body of a mixer
- `torch`             PyTorch operations, on any device
- `auto`              on CUDA native, on a CPU cpu, or torch where these cannot run; elsewhere torch
"""

import importlib
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import torch

from fused.errors import BackendError
from fused.runtime.dtypes import KERNEL_DTYPES, dtype_name
from fused.runtime.modes import batch_invariant as batch_invariant

BACKENDS = ("native", "native_kept", "cpu", "mamba_ssm", "mamba_ssm_inner", "torch")
OPERATOR_BACKEND = {"native_kept": "native", "mamba_ssm_inner": "mamba_ssm"}  # another mixer over the same operators
SWITCH = "VIDEOMAMBA_DISABLE_FUSED"

_log = logging.getLogger("fused")


@dataclass(frozen=True)
class Abilities:
    """The abilities of one backend for one operator; asking for more raises ValueError.

    `fullgraph` says whether `torch.compile(fullgraph=True)` can trace it; where it cannot, the compiler raises.
    """

    initial_state: bool
    final_state_grad: bool
    reverse: bool
    groups: bool
    dtypes: tuple[torch.dtype, ...]
    devices: tuple[str, ...]
    fullgraph: bool = True


TORCH = Abilities(True, True, True, True, (*KERNEL_DTYPES, torch.float64), ("cpu", "cuda", "mps", "xpu"))
NATIVE = Abilities(True, True, True, True, KERNEL_DTYPES, ("cuda",))
CPU = Abilities(True, True, True, True, (*KERNEL_DTYPES, torch.float64), ("cpu",))


def declared(op: str, table: Mapping[str, Abilities], backend: str) -> Abilities:
    """Return what `backend` can do for an operator whose `table` maps the backends of operators to their abilities.

    An operator without kernels for CPUs is PyTorch operations on `cpu`. Raises ValueError for an unknown name, and for a
    backend that does not have the operator.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    operator_backend = operators_of(backend)
    if operator_backend == "cpu" and "cpu" not in table:
        operator_backend = "torch"
    if operator_backend not in table:
        raise ValueError(f"{op}: backend {backend!r} does not have it; allowed are {', '.join(table)}")
    return table[operator_backend]


def operators_of(backend: str) -> str:
    """Return the backend whose scan, conv and norm `backend` uses: `native_kept` and `mamba_ssm_inner` differ in the mixer."""
    return OPERATOR_BACKEND.get(backend, backend)


def check_abilities(
    op: str, table: Mapping[str, Abilities], backend: str, dtype: torch.dtype, asked: Mapping[str, bool]
) -> None:
    """Raise ValueError if `backend` cannot do what the caller asks of `op`, naming a backend that can.

    `asked` maps a field of `Abilities` to whether the caller needs it. The answer is the same on every machine: `unavailable`
    says whether the backend can run here. `auto` passes.
    """
    if backend == "auto":
        return
    able = declared(op, table, backend)
    for argument, needed in asked.items():
        if needed and not getattr(able, argument):
            raise ValueError(f"{op}: backend {backend!r} does not support {argument}; use backend='torch'")
    if dtype not in able.dtypes:
        names = ", ".join(map(dtype_name, able.dtypes))
        raise ValueError(f"{op}: backend {backend!r} supports {names}, got {dtype}; use backend='torch'")


def unavailable(backend: str, device: torch.device | str) -> str | None:
    """Return None if `backend` can run on `device`, else one sentence: the reason, and what to do."""
    kind = torch.device(device).type
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if kind == "cuda" and not torch.cuda.is_available():
        return "PyTorch sees no CUDA device: run on the CPU, or install a CUDA build of PyTorch and its driver."
    if backend == "torch":
        return None
    if backend == "cpu":
        if kind != "cpu":
            return f"cpu runs on CPUs only and the input is on {kind}: move model and input to the CPU, or use 'auto'."
        from fused.runtime import cpu_library

        return cpu_library.unavailable()
    if kind != "cuda":
        return f"{backend} runs on CUDA only and the input is on {kind}: move model and input to a GPU, or use 'torch'."
    if operators_of(backend) == "native":
        return _native_failure(device)
    for module in ("mamba_ssm", "causal_conv1d"):
        reason = _import_failure(module)
        if reason:
            return (
                f"{module} cannot be imported ({reason}): install it with `nox -s upstream` "
                "(or `pip install mamba-ssm causal-conv1d --no-build-isolation`), or use backend='torch'."
            )
    return None


def check_can_run(name: str, device: torch.device | str) -> None:
    """Raise ValueError for an unknown backend, BackendError for one that cannot run on the device: before there is an input."""
    if name != "auto":
        choose(name, device)


def choose(name: str, device: torch.device | str, *, use_fast_path: bool = True) -> str:
    """Return the backend that runs for `name` on `device`; an explicit name comes back as it is.

    Raises ValueError for an unknown name, BackendError for a backend that cannot run there.
    """
    if name != "auto":
        if name not in BACKENDS:
            raise ValueError(f"backend must be one of auto, {', '.join(BACKENDS)}, got {name!r}")
        reason = unavailable(name, device)
        if reason:
            raise BackendError(f"backend {name!r} cannot run here. {reason}")
        return name
    kind = torch.device(device).type
    if not use_fast_path:
        return _announce("torch", "use_fast_path is False")
    if os.environ.get(SWITCH, "").strip().lower() in ("1", "true", "yes", "y", "on"):
        return _announce("torch", f"{SWITCH} is set")
    kernels = {"cuda": "native", "cpu": "cpu"}.get(kind)
    if kernels is None:
        return _announce("torch", f"the input is on {kind}")
    reason = unavailable(kernels, device)
    if reason is None:
        return _announce(kernels, f"the input is on {kind}")
    return _announce("torch", reason, logging.WARNING if kind == "cpu" else logging.INFO)


# torch.compile calls it and does not trace it. torch.compiler.assume_constant_result sets this too, but imports the compiler.
choose.__dict__["_dynamo_marked_constant"] = True


@cache
def _native_failure(device: torch.device | str) -> str | None:
    """Return why native kernels cannot run: Triton and NVRTC must be there; whether kernels compile shows at the first call."""
    reason = _import_failure("triton")
    if reason:
        return f"triton cannot be imported ({reason}): install PyTorch's CUDA build, or use backend='torch'."
    from fused.runtime import nvrtc

    return nvrtc.unavailable(device)


@cache
def _announce(backend: str, reason: str, level: int = logging.INFO) -> str:
    """Log an automatic choice, once per process and reason."""
    _log.log(level, "backend 'auto' chose %r: %s", backend, reason)
    return backend


def _import_failure(module: str) -> str | None:
    """Return why a module cannot be imported. Importing is the test: an extension for another PyTorch is found but fails."""
    try:
        importlib.import_module(module)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None
