"""CUDA graphs of a module, captured once for each shape of its arguments."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

import fused

Run = Callable[..., Any]


def for_inference(call: Run, args: tuple[Tensor, ...]) -> Run:
    """Return a call with arguments of these shapes that replays one CUDA graph; it copies the arguments and the result."""
    static = tuple(arg.detach().clone() for arg in args)
    warm_up(lambda: call(*static))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call(*static)

    def replay(*args: Tensor) -> Any:
        for own, arg in zip(static, args, strict=True):
            own.copy_(arg)
        graph.replay()
        return tree_map(torch.clone, result)

    return replay


def for_training(module: nn.Module, args: tuple[Tensor, ...]) -> nn.Module:
    """Return the module, its forward and backward replaced in place by CUDA graphs for arguments of these shapes.

    Under autocast they are captured without its cache of weights, which must not outlive a capture; replays need none.
    """
    device = args[0].device.type
    on, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    sample = tuple(arg.detach().clone().requires_grad_(arg.requires_grad) for arg in args)
    with torch.autocast(device, dtype, enabled=on, cache_enabled=False):
        torch.cuda.make_graphed_callables(module, sample, allow_unused_input=True)
    return module


def by_product(model: nn.Module) -> Run | None:
    """Return the model by `fused.graphed`; None for a model of another kind, or a `fused` without it."""
    graphed = getattr(fused, "graphed", None)
    return graphed(model) if graphed and isinstance(model, fused.VideoMamba) else None


def warm_up(call: Callable[[], object], times: int = 3) -> None:
    """Call on a stream of its own, where the work of a first call is not captured."""
    side_stream = torch.cuda.Stream()
    side_stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side_stream):
        for _ in range(times):
            call()
    torch.cuda.current_stream().wait_stream(side_stream)
