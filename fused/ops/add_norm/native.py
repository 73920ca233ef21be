"""Add and normalise by kernels of this project, as the operator `videomamba::add_norm`."""

import functools
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fused.ops.add_norm import launch
from fused.ops.shapes import Rows, residual_dtype_of
from fused.runtime.checks import check_native_dtypes
from fused.runtime.dtypes import KERNEL_DTYPES
from fused.runtime.library import apply_function, below_autograd, none_if_empty, register


def add_norm_native(
    x: Rows,
    weight: Float[Tensor, " D"],
    bias: Float[Tensor, " D"] | None = None,
    *,
    residual: Rows | None = None,
    eps: float = 1e-5,
    kind: str = "rms",
    prenorm: bool = True,
    residual_in_fp32: bool = True,
    kept: Float[Tensor, " B"] | None = None,
    scale: float = 1.0,
) -> Rows | tuple[Rows, Rows]:
    """Add and normalise as `fused.add_norm` says, in one kernel each way; keeps what the PyTorch version keeps.

    With `kept`, 0 or 1 for each clip, x (B, ..., D) is multiplied by scale * kept before it is added to `residual`, unrounded.

    Raises ValueError for rows of more than 8192 channels, for a tensor in float64 and for sizes that do not fit together.
    """
    check_norm_arguments(x, weight, bias, residual, kept)
    residual_dtype = residual_dtype_of(x, residual, residual_in_fp32) if prenorm else None
    y, residual_out, _, _ = _add_norm(x, weight, bias, residual, kept, scale, eps, kind == "layer", residual_dtype)
    return (y, residual_out) if prenorm else y


def check_norm_arguments(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, kept: Tensor | None = None
) -> None:
    """Raise ValueError unless the kernels can take the arguments: they would read beyond tensors that do not fit."""
    D = x.shape[-1]
    if kept is not None and (residual is None or kept.shape != x.shape[:1] or kept.dtype != torch.float32):
        shape = tuple(kept.shape)
        raise ValueError(f"add_norm: kept must be ({len(x)},) in float32 beside a residual, got {shape} in {kept.dtype}")
    if weight.shape != (D,) or (bias is not None and bias.shape != (D,)):
        raise ValueError(f"add_norm: weight and bias must have shape (D={D},), got weight {tuple(weight.shape)}")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"add_norm: residual must have x's shape {tuple(x.shape)}, got {tuple(residual.shape)}")
    if D > launch.MAX_WIDTH:
        raise ValueError(
            f"add_norm: backend 'native' has D of at most {launch.MAX_WIDTH}, got x of shape {tuple(x.shape)}; "
            "use backend='torch'"
        )
    for tensor in (x, weight, bias, residual):
        if tensor is not None and tensor.dtype not in KERNEL_DTYPES:
            check_native_dtypes("add_norm", x=x, weight=weight, bias=bias, residual=residual)


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, kept: Tensor | None, scale: float,
    eps: float, centre: bool, residual_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:  # fmt: skip
    """Return y and v (..., D), mean and rstd (...,) of x and residual (..., D); None for a result that was not asked for."""
    return launch.forward(x, residual, weight, bias, eps, centre, residual_dtype, kept=kept, scale=scale)


def _forward_shapes(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, kept: Tensor | None, scale: float,
    eps: float, centre: bool, residual_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return (
        x.new_empty(x.shape),
        x.new_empty(0) if residual_dtype is None else x.new_empty(x.shape, dtype=residual_dtype),
        x.new_empty(x.shape[:-1], dtype=torch.float32) if centre else x.new_empty(0),
        x.new_empty(x.shape[:-1], dtype=torch.float32),
    )


def _backward(
    v_or_x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, kept: Tensor | None, mean: Tensor | None,
    rstd: Tensor, scale: float, dy: Tensor, dout: Tensor | None, x_dtype: torch.dtype, residual_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:  # fmt: skip
    """Return dx, dresidual (..., D), dweight and dbias (D,); dresidual is None where it is dx or None, dbias for None."""
    dx, dresidual, dweight, dbias = launch.backward(
        dy, dout, v_or_x, residual, weight, bias, mean, rstd, x_dtype, residual_dtype, kept=kept, scale=scale
    )
    return dx, None if dresidual is dx else dresidual, dweight, dbias


def _backward_shapes(
    v_or_x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, kept: Tensor | None, mean: Tensor | None,
    rstd: Tensor, scale: float, dy: Tensor, dout: Tensor | None, x_dtype: torch.dtype, residual_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    separate_dresidual = residual_dtype is not None and (residual_dtype != x_dtype or kept is not None)
    return (
        v_or_x.new_empty(v_or_x.shape, dtype=x_dtype),
        v_or_x.new_empty(v_or_x.shape, dtype=residual_dtype) if separate_dresidual else v_or_x.new_empty(0),
        weight.new_empty(weight.shape),
        v_or_x.new_empty(0) if bias is None else bias.new_empty(bias.shape),
    )


class _AddNorm(torch.autograd.Function):
    """Autograd of the operator. It saves v where v is returned unrounded, else x and residual; and each row's mean and rstd."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, kept: Tensor | None, scale: float,
        eps: float, centre: bool, residual_dtype: torch.dtype | None,
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
        ctx.set_materialize_grads(False)
        ctx.dtypes, ctx.scale = (x.dtype, None if residual is None else residual.dtype), scale
        operator = torch.ops.videomamba.add_norm.default
        y, out, mean, rstd = below_autograd(operator, x, weight, bias, residual, kept, scale, eps, centre, residual_dtype)
        v_or_x, residual = (out, None) if residual_dtype == torch.float32 else (x, residual)
        ctx.save_for_backward(v_or_x, residual, weight, bias, kept, none_if_empty(mean), rstd)
        ctx.mark_non_differentiable(*(t for t in (mean, rstd, None if residual_dtype else out) if t is not None))
        return y, out, mean, rstd

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dout: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # read once: activation checkpointing recomputes them at every access
        x_dtype, residual_dtype = ctx.dtypes
        kept, nones = saved[4], (None,) * 5
        if dy is None:  # the sum alone was used
            dx, dresidual = (None if dout is None or dtype is None else dout.to(dtype) for dtype in ctx.dtypes)
            if dout is not None and kept is not None:
                dx = (dout * (ctx.scale * kept).view(-1, *(1,) * (dout.dim() - 1))).to(x_dtype)
            return dx, None, None, dresidual, *nones
        dx, dresidual, dweight, dbias = _add_norm_backward(*saved, ctx.scale, dy, dout, x_dtype, residual_dtype)
        if residual_dtype is None or (residual_dtype == x_dtype and kept is None):
            dresidual = None if residual_dtype is None else dx
        return dx, dweight, None if saved[3] is None else dbias, dresidual, *nones


_add_norm_backward = register(
    "add_norm_backward(Tensor v_or_x, Tensor? residual, Tensor weight, Tensor? bias, Tensor? kept, Tensor? mean, Tensor rstd, "
    "float scale, Tensor dy, Tensor? dout, ScalarType x_dtype, ScalarType? residual_dtype) "
    "-> (Tensor dx, Tensor dresidual, Tensor dweight, Tensor dbias)",  # dresidual is empty where dx serves for both
    _backward,
    _backward_shapes,
)
_add_norm = register(
    "add_norm(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, Tensor? kept, float scale, float eps, bool centre, "
    " ScalarType? residual_dtype) "
    "-> (Tensor y, Tensor residual_out, Tensor mean, Tensor rstd)",  # empty for a result that was not asked for
    _forward,
    _forward_shapes,
    autograd=functools.partial(apply_function, _AddNorm),
)
