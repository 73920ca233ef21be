"""Products with weights in float32 on a CPU, by oneDNN where PyTorch has it.

PyTorch's own float32 products are MKL's, which take half of the vector width on AMD's CPUs: 108 GFLOP/s a core there, where
oneDNN gives 240 (measured on an EPYC with AVX-512, PyTorch 2.13). Both sum in float32. Small products stay with MKL: oneDNN
brings the weights into an order of its own first.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fused.runtime.autocast import autocast_dtype
from fused.runtime.exporting import is_exporting
from fused.runtime.library import wants_gradients

SMALLEST = 2**23
"""Multiplications from which oneDNN's product takes less time than MKL's."""
AVAILABLE = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def linear(x: Tensor, layer: nn.Linear) -> Tensor:
    """Return layer(x) (..., o) of x (..., i) for a layer that is nothing but its weight and bias; the module is not called."""
    weight, bias = layer.weight, layer.bias
    traced = is_exporting() or torch.compiler.is_compiling()  # asked first: a graph must not depend on the number of rows
    if traced or autocast_dtype(x.device) is not None or not _takes(x, weight):
        return F.linear(x, weight, bias)
    return _Linear.apply(x, weight, bias) if wants_gradients(x, weight, bias) else multiply(x, weight, bias)


def _takes(x: Tensor, weight: Tensor) -> bool:
    """Return whether oneDNN shall multiply x (..., i) and weight (o, i)."""
    if not AVAILABLE or x.dtype != torch.float32 or weight.dtype != torch.float32 or x.device.type != "cpu":
        return False
    return x.numel() * weight.shape[0] >= SMALLEST and type(x) is Tensor and type(weight) in (Tensor, nn.Parameter)


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x weight^T + bias (..., o) of x (..., i), weight (o, i) and bias (o,) by oneDNN; any of them may be a view."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def product(x: Tensor, y: Tensor) -> Tensor:
    """Return x y (m, n) of x (m, k) and y (k, n), of one dtype on a CPU and not traced; both may be views."""
    if x.dtype == torch.float32 and AVAILABLE and x.shape[0] * y.numel() >= SMALLEST:
        return multiply(x, y.t())
    return torch.mm(x, y)


class _Linear(torch.autograd.Function):
    """Autograd of `linear`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return multiply(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight), rows = ctx.saved_tensors, dy.flatten(0, -2)
        dx = multiply(dy, weight.t()) if ctx.needs_input_grad[0] else None
        dweight = multiply(rows.t(), x.flatten(0, -2).t()) if ctx.needs_input_grad[1] else None
        return dx, dweight, rows.sum(0) if ctx.needs_input_grad[2] else None
