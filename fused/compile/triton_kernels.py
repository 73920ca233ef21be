"""Compilation of a model's Triton kernels without a GPU, in a process of its own.

The models run forward and backward on tiny clips on the CPU, and Triton gets a driver that stands in for a GPU: it names the
architecture, and launches nothing. So Triton's own launch path makes the signature, the options and with them the key of the
cache, those of a launch on the GPU: neither depends on the length, size or number of clips. Results are not looked at.

The process must not be used for anything else afterwards.
"""

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from fused.compile.programs import Compiled
from fused.models.videomamba.config import VideoMambaConfig
from fused.models.videomamba.first_use import run_on_cpu
from fused.models.videomamba.model import VideoMamba
from fused.runtime import ahead

# no kernel depends on these sizes
TINY: dict[str, Any] = {"depth": 1, "img_size": 32, "num_frames": 2, "num_classes": 10}


class _StandInDriver:
    """A Triton driver for a GPU that is not there."""

    def __init__(self, capability: int) -> None:
        from triton.backends.compiler import GPUTarget

        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> Any:
        """Return the architecture to compile for."""
        return self._target

    def get_current_device(self) -> int:
        """Return the number of the only device."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """Return the default stream."""
        return 0


def compile_triton_kernels(capability: int, dtype: torch.dtype, configs: Sequence[VideoMambaConfig]) -> list[Compiled]:
    """Compile the kernels of the models in `dtype`, and under autocast to it, for a compute capability (90 for 9.0).

    Returns the kernels in the order in which they were asked for. Raises whatever Triton raises.
    """
    os.environ.pop("TRITON_INTERPRET", None)  # the interpreter compiles nothing; it is read when Triton is imported
    import triton
    from triton.runtime import driver

    from fused.runtime import triton_code

    driver.set_active(_StandInDriver(capability))
    kernels = []

    def listen(*, src: Any, times: Any, cache_hit: bool, **_: Any) -> None:
        operator = src.fn.__module__.split(".")[-2]
        kernels.append(Compiled(f"{operator} {src.name} (Triton)", cache_hit, times.total / 1e6))

    def compile_now(kernel: Any, args: tuple[Any, ...], constants: dict[str, Any]) -> None:
        triton_code.compile(kernel, args, constants, capability)

    triton.knobs.compilation.listener = listen
    with ahead.compiling(capability, compile_now):
        for config in configs:
            if dtype != torch.float32:
                with torch.autocast("cpu", dtype=dtype):
                    _run(config, torch.float32)
            _run(config, dtype)
    return kernels


def _run(config: VideoMambaConfig, dtype: torch.dtype) -> None:
    """Run layers with weights of `dtype` without gradients, then forward and backward of either native backend."""
    model = VideoMamba(replace(config, **TINY)).to(dtype)
    clip = torch.zeros(2, config.channels, model.config.num_frames or 1, *model.config.sides, dtype=dtype)
    tokens_dtype = model.embed(clip).dtype
    for gradients, backend in ((False, "native"), (True, "native"), (True, "native_kept")):
        run_on_cpu(config, tokens_dtype, dtype, backend, gradients)
