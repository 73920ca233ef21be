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
from fused.models.videomamba.model import VideoMamba

# of three layers, the second has no stochastic depth and the third has; no kernel depends on the other sizes
TINY: dict[str, Any] = {"depth": 3, "img_size": 32, "num_frames": 2, "num_classes": 10}


class _NoModule:
    """Stands in for the scan's kernels, which NVRTC compiles elsewhere."""

    def launch(self, *arguments: Any) -> None:
        """Launch nothing."""


class _StandInDriver:
    """A Triton driver for a GPU that is not there."""

    def __init__(self, capability: int) -> None:
        from triton.backends.compiler import GPUTarget

        self._target = GPUTarget("cuda", capability, 32)
        self.utils = self

    def get_current_target(self) -> Any:
        """Return the architecture to compile for."""
        return self._target

    def get_current_device(self) -> int:
        """Return the number of the only device."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """Return the default stream."""
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        """Return a limit that no kernel reaches: whether a kernel fits shows at its launch on the GPU."""
        return {"max_shared_mem": 1 << 30}

    def load_binary(self, *arguments: Any) -> tuple[Any, ...]:
        """Return what Triton reads of a loaded kernel: module, function, registers, spills, threads of a block at most."""
        return None, None, 0, 0, 1024

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        """Return a launcher that launches nothing."""
        return lambda *arguments: None


def compile_triton_kernels(capability: int, dtype: torch.dtype, configs: Sequence[VideoMambaConfig]) -> list[Compiled]:
    """Compile the kernels of the models in `dtype`, and under autocast to it, for a compute capability (90 for 9.0).

    Returns the kernels in the order in which they were asked for. Raises whatever Triton raises.
    """
    os.environ.pop("TRITON_INTERPRET", None)  # the interpreter compiles nothing; it is read when Triton is imported
    import triton
    from triton.runtime import driver

    from fused.runtime import nvrtc, triton_launch

    triton_launch.compile_for(capability)
    driver.set_active(_StandInDriver(capability))
    vars(nvrtc)["module"] = lambda *arguments: _NoModule()
    kernels = []

    def listen(*, src: Any, times: Any, cache_hit: bool, **_: Any) -> None:
        operator = src.fn.__module__.split(".")[-2]
        kernels.append(Compiled(f"{operator} {src.name} (Triton)", cache_hit, times.total / 1e6))

    triton.knobs.compilation.listener = listen
    for config in configs:
        model = VideoMamba(replace(config, **TINY))
        if dtype != torch.float32:
            with torch.autocast("cpu", dtype=dtype):
                _run(model, torch.float32)
        _run(model.to(dtype), dtype)
    return kernels


def _run(model: VideoMamba, dtype: torch.dtype) -> None:
    """Run a model as on a GPU, without gradients, then forward and backward of either native backend."""
    sides, frames = model.config.sides, model.config.num_frames
    clip = torch.zeros(2, model.config.channels, frames or 1, *sides, dtype=dtype)
    for gradients, backend in ((False, "native"), (True, "native"), (True, "native_kept")):
        with torch.set_grad_enabled(gradients):
            first, *layers = model.layers
            hidden, residual, _ = first(model.embed(clip), backend=backend)
            for layer in layers:
                hidden, residual, _ = layer(hidden, residual, backend=backend)
            tokens = model.apply_final_norm(hidden, residual, backend, part=slice(0, 1))
            logits = model.head(tokens[:, 0])
        if gradients:
            logits.float().sum().backward()
