"""Compilation of the Triton kernels of a model's layers in parallel, when the first layer is about to be run on a GPU.

Otherwise each would be compiled at its first launch, one after the other, those of the backward last.
"""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from fused.models.videomamba.block import Block
from fused.models.videomamba.config import VideoMambaConfig
from fused.modules.norm import Norm
from fused.modules.residual import final_norm
from fused.runtime import ahead, cubin_cache, triton_code, triton_launch

CLIPS, TOKENS, DROP_PATH_RATE = 2, 9, 0.1  # no kernel depends on these values
PACKAGE = Path(__file__).parents[2]


def start_compiling(config: VideoMambaConfig, tokens: Tensor, dtype: torch.dtype, backend: str) -> None:
    """Start to compile what layers with weights of `dtype` launch for tokens (B, L, D) on a GPU, and their backward.

    The backward is left out where no gradient is recorded. It takes a tenth of a second; kernels are compiled in background
    threads, and each waits for its own at its first launch. The names of their files are kept, so that a process that finds
    these files has nothing to do.
    """
    device, gradients = tokens.device, torch.is_grad_enabled()
    autocast = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    capability = triton_launch.capability(device)
    layers = config, tokens.dtype, dtype, autocast, backend, gradients, capability
    listed = cubin_cache.path_of(("layers", sources(PACKAGE), torch.__version__, triton.__version__, *layers))
    names = (cubin_cache.read(listed) or b"").decode().split()
    if names and all((listed.parent / name).exists() for name in names):
        return
    found, start = dict[str, None](), ahead.compile_in_background(device, triton_code.of)

    def compile(kernel: Any, args: tuple[Any, ...], constants: dict[str, Any]) -> None:
        found[triton_code.path_of(kernel, args, constants, capability).name] = None
        start(kernel, args, constants)

    with (
        ahead.compiling(capability, compile),
        torch.random.fork_rng(devices=()),
        torch.inference_mode(False),
        torch.autograd.set_detect_anomaly(False),
        _disable_current_modes(),  # which might count operations
        torch.autocast("cuda", enabled=False),
        torch.autocast("cpu", autocast[1], autocast[0]),
    ):
        run_on_cpu(config, tokens.dtype, dtype, backend, gradients)
    cubin_cache.keep(listed, "\n".join(found).encode())


def sources(package: Path) -> list[tuple[str, int, int]]:
    """Return names, sizes and times of change of a package's Python files.

    Reading them takes several times as long. A change that shows in none of these leaves its kernels to their first launch.
    """
    found = []
    for folder, _, files in os.walk(package):
        inside = folder.removeprefix(str(package))
        for name in files:
            if name.endswith(".py"):
                stat = os.stat(os.path.join(folder, name))
                found.append((os.path.join(inside, name), stat.st_size, stat.st_mtime_ns))
    return sorted(found)


def run_on_cpu(
    config: VideoMambaConfig, tokens_dtype: torch.dtype, dtype: torch.dtype, backend: str, gradients: bool
) -> None:
    """Run layers and the final norm on few tokens on the CPU, and backward with `gradients`; results are not looked at."""
    config, rate = replace(config, use_checkpoint=False), config.drop_path_rate if gradients else 0.0
    with torch.device("cpu"):
        # the first layer has no residual, only the last has stochastic depth
        layers = [Block(config, i, rate) for i, rate in enumerate((0.0, 0.0, DROP_PATH_RATE if rate is None else rate))]
        norm = Norm(config.embed_dim, config.norm_epsilon, "rms" if config.rms_norm else "layer")
    for module in (*layers, norm):
        module.to(dtype)
    hidden = torch.zeros(CLIPS, TOKENS, config.embed_dim, dtype=tokens_dtype, device="cpu", requires_grad=gradients)
    residual = None
    with torch.set_grad_enabled(gradients):
        for layer in layers:
            hidden, residual, _ = layer(hidden, residual, backend=backend)
        assert residual is not None
        y = final_norm(norm, hidden[:, :1], residual[:, :1], fused_add_norm=config.fused_add_norm, backend=backend)
    if gradients:
        y.float().sum().backward()
