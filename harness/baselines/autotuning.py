"""Rivals' Triton kernels that are tuned at their first call: all their configurations are compiled at once.

Triton's autotuner compiles them one after another, which takes mamba-ssm's SSD backward 100 seconds. What is timed, and what
the autotuner chooses, is the same.
"""

import contextlib
import functools
import os
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from typing import Any

import torch


@functools.cache
def compile_in_threads() -> None:
    """Let the autotuners of this process compile in threads, once for all; do nothing where mamba-ssm is not installed."""
    if find_spec("mamba_ssm") is None:
        return
    from triton.runtime.autotuner import Autotuner

    prune = Autotuner.prune_configs

    @functools.wraps(prune)
    def compile_pruned(tuner: Any, kwargs: dict[str, Any]) -> list[Any]:
        configs = prune(tuner, kwargs)
        device = torch.cuda.current_device() if torch.cuda.is_available() else None
        arguments = list(tuner.nargs.values())

        def build(config: Any) -> None:
            # what cannot be compiled fails again, and is skipped, where the autotuner tries it
            with contextlib.suppress(Exception), torch.cuda.device(device) if device is not None else contextlib.nullcontext():
                tuner.fn.run(*arguments, **kwargs | config.all_kwargs() | {"warmup": True})

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(build, configs))
        return configs

    Autotuner.prune_configs = compile_pruned
