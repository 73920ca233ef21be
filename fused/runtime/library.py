"""Operators `videomamba::` with a kernel each way, as PyTorch's dispatcher knows them, and the short way to their kernels."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fused.runtime.checks import no_autocast

_OPS = torch.library.Library("videomamba", "FRAGMENT")


def register(schema: str, kernel: Callable[..., Any], shapes: Callable[..., Any]) -> None:
    """An operator of a tensor and more: what runs it, and what gives empty tensors of its results' shapes and dtypes."""
    _OPS.define(schema)
    name = schema.partition("(")[0]

    def run(*arguments: Any) -> Any:
        device = next(x.device for x in arguments if isinstance(x, Tensor))
        with no_autocast(device):  # its rules would reach what the kernel calls; a backward may run within it by itself
            return kernel(*arguments)

    for device in ("CUDA", "CPU"):  # on the CPU under Triton's interpreter only
        _OPS.impl(name, run, device)
    torch.library.register_fake(f"videomamba::{name}", shapes, lib=_OPS)  # unlike a kernel for Meta it is told the device


def wants_gradients(*arguments: Any) -> bool:
    """Whether autograd will ask for a gradient of one of them."""
    return torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in arguments)


def differentiable(name: str, function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """Give an operator its gradient. Returns it with a round through the dispatcher less on its way to a kernel, but while a
    compiler traces, which must see the operator."""

    def run(*arguments: Any) -> Any:
        return function.apply(*arguments) if wants_gradients(*arguments) else below_autograd(name, *arguments)

    def short(*arguments: Any) -> Any:
        if torch.compiler.is_compiling():
            return getattr(torch.ops.videomamba, name).default(*arguments)
        return run(*arguments)

    _OPS.impl(name, run, "Autograd")
    return short


def below_autograd(name: str, *arguments: Any) -> Any:
    """The kernel of an operator, within its own `torch.autograd.Function`."""
    with torch._C._AutoDispatchBelowAutograd():
        return getattr(torch.ops.videomamba, name).default(*arguments)
