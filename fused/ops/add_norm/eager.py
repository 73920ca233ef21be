"""Add and normalise in PyTorch operations, for any device."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from fused.ops.shapes import Rows, residual_dtype_of
from fused.runtime.autocast import no_autocast
from fused.runtime.dtypes import accumulation_dtype
from fused.runtime.elementwise import cast
from fused.runtime.exporting import is_exporting
from fused.runtime.library import wants_gradients


def add_norm_eager(
    x: Rows,
    weight: Float[Tensor, " D"],
    bias: Float[Tensor, " D"] | None = None,
    *,
    residual: Rows | None = None,
    eps: float = 1e-5,
    kind: str = "rms",
    prenorm: bool = True,
    residual_in_fp32: bool = True,
) -> Rows | tuple[Rows, Rows]:
    """Add and normalise as `fused.add_norm` says; keeps the residual stream and two numbers a row for its backward."""
    residual_dtype = residual_dtype_of(x, residual, residual_in_fp32) if prenorm else None
    differentiate = wants_gradients(x, weight, bias, residual) and not is_exporting()
    run: Any = _AddNorm.apply if differentiate else _forward
    y, residual_out, *_ = run(x, weight, bias, residual, eps, kind == "layer", residual_dtype)
    return (y, residual_out) if prenorm else y


class _AddNorm(torch.autograd.Function):
    """Autograd of the norm. It saves v where v is returned unrounded, else x and residual.

    `residual_dtype` is the dtype of residual_out, None without it.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None,
        eps: float, centre: bool, residual_dtype: torch.dtype | None,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        ctx.set_materialize_grads(False)
        ctx.centre, ctx.dtypes = centre, (x.dtype, None if residual is None else residual.dtype)
        y, out, v, mean, scale = _forward(x, weight, bias, residual, eps, centre, residual_dtype)
        kept = (out, None) if residual_dtype == v.dtype else (x, residual)
        ctx.save_for_backward(*kept, weight, bias, mean, scale)
        return y, out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dout: Tensor | None) -> tuple[Tensor | None, ...]:
        v_or_x, residual, weight, bias, mean, scale = ctx.saved_tensors
        dv = dweight = dbias = None
        with no_autocast(v_or_x.device):
            if dy is not None:
                v = _add(v_or_x, residual)
                dy = dy.to(v.dtype)
                unit = v * scale if mean is None else (v - mean).mul_(scale)
                dweighted = dy * unit
                dweight = dweighted.reshape(-1, v.shape[-1]).sum(0).to(weight.dtype)
                dbias = None if bias is None else dy.reshape(-1, v.shape[-1]).sum(0).to(bias.dtype)
                dv = dy * weight
                shares = dweighted.mul_(weight).mean(-1, keepdim=True).neg_()
                if ctx.centre:
                    dv -= dv.mean(-1, keepdim=True)
                dv.addcmul_(unit, shares).mul_(scale)  # Dynamo would round it twice with value=-1
            if dout is not None:
                dv = dout if dv is None else dv + dout
            dx, dresidual = (None if dv is None or dtype is None else dv.to(dtype) for dtype in ctx.dtypes)
        return dx, dweight, dbias, dresidual, None, None, None


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None,
    eps: float, centre: bool, residual_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None, Tensor]:  # fmt: skip
    """Return y (..., D), residual_out (..., D) or None, and v (..., D) with its mean, if it is centred, and scale (..., 1).

    A compiler and an export trace it as a graph of pure functions.
    """
    with no_autocast(x.device):
        v = _add(x, residual)
        mean = v.mean(-1, keepdim=True) if centre else None
        centred = v if mean is None else v - mean
        scale = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
        y = centred * scale * weight
        if bias is not None:
            y = y + bias if torch.compiler.is_compiling() else y.add_(bias)
        out = None if residual_dtype is None else cast(v, residual_dtype)
        return cast(y, x.dtype), out, v, mean, scale


def _add(x: Tensor, residual: Tensor | None) -> Tensor:
    """Return x + residual (..., D) in at least float32."""
    v = x.to(accumulation_dtype(x.dtype))
    return v if residual is None else v + residual.to(v.dtype)
