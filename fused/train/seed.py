"""Repeatable training: one seed for every generator, and only algorithms that give the same bits again."""

import hashlib
import os
import random

import torch

from fused.rules import check_integer

CUBLAS_VARIABLE = "CUBLAS_WORKSPACE_CONFIG"
REPEATABLE_WORKSPACES = (":4096:8", ":16:8")  # cuBLAS documentation, "Results reproducibility"


def setup_seed(seed: int, deterministic: bool = True) -> None:
    """Seed Python, NumPy (where installed) and PyTorch on all devices, and with `deterministic` make training repeatable.

    A repeatable training gives the same weights, bit for bit, for the same seed, data, machine and versions. To this end
    PyTorch is switched to deterministic algorithms (an operation without one raises), cuDNN's benchmark mode is switched off,
    and CUBLAS_WORKSPACE_CONFIG is set before cuBLAS starts, unless it is set already. Backends `native` and `torch` are
    repeatable. `mamba_ssm` and `mamba_ssm_inner` are not: their gradients use atomic additions, which PyTorch's switch does
    not cover. With deterministic=False none of these settings is touched.

    `seed` is an integer from 0 to 2^32 - 1, NumPy's range. Raises TypeError or ValueError for another seed, and RuntimeError
    where CUBLAS_WORKSPACE_CONFIG has another value, or has none and CUDA has started: call this function first, or set the
    variable in the environment.
    """
    check_integer("setup_seed", "seed", seed, 0, 2**32 - 1)
    if not isinstance(deterministic, bool):
        raise TypeError(f"setup_seed: deterministic must be True or False, got {type(deterministic).__name__}")
    if deterministic:
        _set_cublas_workspace()
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.deterministic = True
        torch.backends.cudnn.benchmark = False
    random.seed(seed)
    torch.manual_seed(seed)  # of every device
    try:
        import numpy
    except ImportError:
        return
    numpy.random.seed(seed)


def derive_seed(*position: int) -> int:
    """Return a seed, 0 to 2^63 - 1, for a position in a training, such as (seed, step, rank).

    The position alone decides it. A training that resumes from a checkpoint draws the same numbers as one that was never
    stopped, and no generator state has to be stored.
    """
    return int.from_bytes(hashlib.blake2b(repr(position).encode(), digest_size=8).digest(), "big") >> 1


def _set_cublas_workspace() -> None:
    """Set CUBLAS_WORKSPACE_CONFIG to a repeatable value. Raise RuntimeError where that is no longer possible."""
    allowed = " or ".join(REPEATABLE_WORKSPACES)
    if os.environ.get(CUBLAS_VARIABLE) in REPEATABLE_WORKSPACES:
        return
    if CUBLAS_VARIABLE in os.environ:
        current = os.environ[CUBLAS_VARIABLE]
        raise RuntimeError(
            f"setup_seed: {CUBLAS_VARIABLE} must be {allowed} for cuBLAS to be repeatable, got {current!r}; unset it"
        )
    if torch.cuda.is_initialized():
        raise RuntimeError(
            f"setup_seed: CUDA has started without {CUBLAS_VARIABLE}, which cuBLAS reads when it starts; call setup_seed "
            f"before anything is on a GPU, or set {CUBLAS_VARIABLE} to {allowed} in the environment"
        )
    os.environ[CUBLAS_VARIABLE] = REPEATABLE_WORKSPACES[0]
