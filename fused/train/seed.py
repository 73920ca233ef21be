"""Repeatable training: one seed for every generator, and only algorithms that give the same bits again."""

import hashlib
import os
import random

import torch

from fused.rules import check_integer

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
REPEATABLE = (":4096:8", ":16:8")  # cuBLAS, "Results reproducibility"


def setup_seed(seed: int, deterministic: bool = True) -> None:
    """Seed Python, NumPy (where installed) and PyTorch on all devices; with `deterministic` also make training repeatable:
    the same seed, data, machine and versions give the same weights, bit for bit.

    For that it asks PyTorch for deterministic algorithms (an operation that has none raises), turns off cuDNN's choice by
    time, and sets CUBLAS_WORKSPACE_CONFIG, unless it is set, before cuBLAS starts. Backends `native` and `torch` are
    repeatable; `mamba_ssm` and `mamba_ssm_inner` are not: they add atomically in their gradients, which PyTorch's switch does
    not see. With deterministic=False settings stay as they are.

    `seed` is an integer from 0 to 2^32 - 1, NumPy's range. Raises TypeError or ValueError for another, RuntimeError where
    CUBLAS_WORKSPACE_CONFIG has another value, or none and CUDA has started: call it first, or set the variable outside.
    """
    check_integer("setup_seed", "seed", seed, 0, 2**32 - 1)
    if not isinstance(deterministic, bool):
        raise TypeError(f"setup_seed: deterministic must be True or False, got {type(deterministic).__name__}")
    if deterministic:
        _fix_cublas()
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.deterministic = True
        torch.backends.cudnn.benchmark = False
    random.seed(seed)
    torch.manual_seed(seed)  # every device's
    try:
        import numpy
    except ImportError:
        return
    numpy.random.seed(seed)


def seed_of(*place: int) -> int:
    """A seed, 0 to 2^63 - 1, for one place in a training, such as (seed, step, rank): what is drawn there is the same for a
    training that went on from a checkpoint as for one that never stopped, and no generator's state is saved."""
    return int.from_bytes(hashlib.blake2b(repr(place).encode(), digest_size=8).digest(), "big") >> 1


def _fix_cublas() -> None:
    allowed = " or ".join(REPEATABLE)
    if os.environ.get(WORKSPACE) in REPEATABLE:
        return
    if WORKSPACE in os.environ:
        came = os.environ[WORKSPACE]
        raise RuntimeError(f"setup_seed: {WORKSPACE} must be {allowed} for cuBLAS to be repeatable, got {came!r}; unset it")
    if torch.cuda.is_initialized():
        raise RuntimeError(
            f"setup_seed: CUDA has started without {WORKSPACE}, which cuBLAS reads when it starts; call setup_seed before "
            f"anything is on a GPU, or set {WORKSPACE} to {allowed} in the environment"
        )
    os.environ[WORKSPACE] = REPEATABLE[0]
