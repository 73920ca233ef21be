"""Add and normalise: what stands between two mixers, on the residual stream.

    v = x + residual
    y = v / sqrt(mean(v^2) + eps) * weight + bias                             kind "rms"
    y = (v - mean(v)) / sqrt(mean((v - mean(v))^2) + eps) * weight + bias     kind "layer"

The means are over the last dimension, and y comes from v before v is rounded for storage.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from fused import backends
from fused.backends import NATIVE, TORCH, Abilities
from fused.ops import mamba_ssm as upstream
from fused.ops.selective_scan import export as traceable
from fused.runtime.checks import check_choice, check_native_dtypes, check_tensor, no_autocast
from fused.runtime.dtypes import KERNEL_DTYPES, accumulation_dtype
from fused.runtime.library import below_autograd, differentiable, register

KINDS = ("rms", "layer")
Rows = Float[Tensor, "*B D"]


BACKENDS = {
    "native": NATIVE,
    "mamba_ssm": Abilities(False, False, False, False, KERNEL_DTYPES, ("cuda",)),
    "torch": TORCH,
}
"""Abilities of the backends that have this operator."""


def add_norm(
    x: Rows,
    weight: Float[Tensor, " D"],
    bias: Float[Tensor, " D"] | None = None,
    *,
    residual: Rows | None = None,
    eps: float = 1e-5,
    kind: str = "rms",
    prenorm: bool = True,
    residual_in_fp32: bool = True,
    backend: str = "auto",
) -> Rows | tuple[Rows, Rows]:
    """Return y in x's dtype, or (y, residual_out) if `prenorm`.

    Computes in at least float32. residual_out is v in the residual's dtype if one came, else in at least float32 when
    `residual_in_fp32`, else in x's dtype. Gradients reach every tensor and flow from both results.

    Raises TypeError or ValueError for an argument that does not fit, ValueError for a dtype that the backend does not
    have, BackendError for a backend that cannot run here.

        >>> y, residual = add_norm(torch.randn(2, 63, 8), torch.ones(8))
    """
    _check(x, weight, bias, residual, kind)
    backends.check_abilities("add_norm", BACKENDS, backend, x.dtype, {})
    chosen = backends.operators_of(backends.choose(backend, x.device))
    run = {"native": norm_native, "torch": norm_torch}.get(chosen, upstream.add_norm)
    return run(
        x,
        weight,
        bias,
        residual=residual,
        eps=eps,
        kind=kind,
        prenorm=prenorm,
        residual_in_fp32=residual_in_fp32,
    )


def norm_torch(
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
    """Add and normalise in PyTorch operations; keeps the residual stream and two numbers a row for its backward."""
    stored = _stored(x, residual, residual_in_fp32) if prenorm else None
    run: Any = traceable.add_norm if torch.compiler.is_exporting() else _AddNorm.apply
    y, residual_out = run(x, weight, bias, residual, eps, kind == "layer", stored)
    return (y, residual_out) if prenorm else y


def norm_native(
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
    """Add and normalise in one kernel each way, by `torch.ops.videomamba.add_norm`; keeps what `norm_torch` keeps.

    Raises ValueError for rows of more than 8192 channels, and for a tensor in float64.
    """
    _check_native(x, weight, bias, residual)
    stored = _stored(x, residual, residual_in_fp32) if prenorm else None
    y, residual_out, _, _ = _differentiable(x, weight, bias, residual, eps, kind == "layer", stored)
    return (y, residual_out) if prenorm else y


def norm_into(
    out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, *, eps: float, kind: str
) -> Tensor:
    """What `norm_native` returns first; its second is written into a contiguous `out`, which may be residual. No gradients."""
    from fused.ops.add_norm import kernels as norm

    _check_native(x, weight, bias, residual)
    return norm.forward(x, residual, weight, bias, eps, kind == "layer", out.dtype, out)[0]


def _check_native(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> None:
    from fused.ops.add_norm.kernels import MAX_WIDTH

    if x.shape[-1] > MAX_WIDTH:
        raise ValueError(
            f"add_norm: backend 'native' has D of at most {MAX_WIDTH}, got x of shape {tuple(x.shape)}; use backend='torch'"
        )
    check_native_dtypes("add_norm", x=x, weight=weight, bias=bias, residual=residual)


def _stored(x: Tensor, residual: Tensor | None, residual_in_fp32: bool) -> torch.dtype:
    """The dtype of residual_out."""
    if residual is not None:
        return residual.dtype
    return accumulation_dtype(x.dtype) if residual_in_fp32 else x.dtype


class _AddNorm(torch.autograd.Function):
    """`stored` is the dtype of residual_out, or None for none. Where v is returned unrounded, v is what is saved."""

    @staticmethod
    def forward(ctx, x, weight, bias, residual, eps, centre, stored):
        ctx.set_materialize_grads(False)
        ctx.centre, ctx.dtypes = centre, (x.dtype, None if residual is None else residual.dtype)
        with no_autocast(x.device):
            v = _sum(x, residual)
            mean = v.mean(-1, keepdim=True) if centre else None
            centred = v if mean is None else v - mean
            scale = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
            y = centred * scale * weight
            if bias is not None:
                y += bias
            out = None if stored is None else v.to(stored)
        kept = (out, None) if stored == v.dtype else (x, residual)
        ctx.save_for_backward(*kept, weight, bias, mean, scale)
        return y.to(x.dtype), out

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dout):
        first, second, weight, bias, mean, scale = ctx.saved_tensors
        dv = dweight = dbias = None
        with no_autocast(first.device):
            if dy is not None:
                v = _sum(first, second)
                dy = dy.to(v.dtype)
                unit = (v if mean is None else v - mean) * scale
                dweight = (dy * unit).reshape(-1, v.shape[-1]).sum(0).to(weight.dtype)
                dbias = None if bias is None else dy.reshape(-1, v.shape[-1]).sum(0).to(bias.dtype)
                dunit = dy * weight
                dv = dunit - unit * (dunit * unit).mean(-1, keepdim=True)
                if ctx.centre:
                    dv -= dunit.mean(-1, keepdim=True)
                dv *= scale
            if dout is not None:
                dv = dout if dv is None else dv + dout
            dx, dresidual = (None if dv is None or dtype is None else dv.to(dtype) for dtype in ctx.dtypes)
        return dx, dweight, dbias, dresidual, None, None, None


def _native(x, weight, bias, residual, eps, centre, stored):
    from fused.ops.add_norm import kernels as norm

    y, out, mean, rstd = norm.forward(x, residual, weight, bias, eps, centre, stored)
    return y, x.new_empty(0) if out is None else out, x.new_empty(0) if mean is None else mean, rstd


def _native_backward(dy, dout, first, second, weight, bias, mean, rstd, x_dtype, residual_dtype):
    from fused.ops.add_norm import kernels as norm

    dx, dresidual, dweight, dbias = norm.backward(
        dy, dout, first, second, weight, bias, mean, rstd, x_dtype, residual_dtype
    )  # fmt: skip
    own = dresidual is not None and dresidual is not dx
    return dx, dresidual if own else first.new_empty(0), dweight, first.new_empty(0) if dbias is None else dbias


def _shapes(x, weight, bias, residual, eps, centre, stored):
    return (
        x.new_empty(x.shape),
        x.new_empty(0) if stored is None else x.new_empty(x.shape, dtype=stored),
        x.new_empty(x.shape[:-1], dtype=torch.float32) if centre else x.new_empty(0),
        x.new_empty(x.shape[:-1], dtype=torch.float32),
    )


def _shapes_backward(dy, dout, first, second, weight, bias, mean, rstd, x_dtype, residual_dtype):
    own = residual_dtype not in (None, x_dtype)
    return (
        first.new_empty(first.shape, dtype=x_dtype),
        first.new_empty(first.shape, dtype=residual_dtype) if own else first.new_empty(0),
        weight.new_empty(weight.shape),
        first.new_empty(0) if bias is None else bias.new_empty(bias.shape),
    )


class _Native(torch.autograd.Function):
    """Saves what `_AddNorm` does."""

    @staticmethod
    def forward(ctx, x, weight, bias, residual, eps, centre, stored):
        ctx.set_materialize_grads(False)
        ctx.dtypes = (x.dtype, None if residual is None else residual.dtype)
        y, out, mean, rstd = below_autograd("add_norm", x, weight, bias, residual, eps, centre, stored)
        kept = (out, None) if stored == torch.float32 else (x, residual)
        ctx.save_for_backward(*kept, weight, bias, mean if centre else None, rstd)
        ctx.mark_non_differentiable(mean, rstd, *(() if stored else (out,)))
        return y, out, mean, rstd

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dout, _mean, _rstd):
        first, second, weight, bias, mean, rstd = ctx.saved_tensors
        x_dtype, residual_dtype = ctx.dtypes
        if dy is None:  # the sum alone was used
            dx, dresidual = (None if dout is None or dtype is None else dout.to(dtype) for dtype in ctx.dtypes)
            return dx, None, None, dresidual, None, None, None
        dx, dresidual, dweight, dbias = torch.ops.videomamba.add_norm_backward.default(
            dy, dout, first, second, weight, bias, mean, rstd, x_dtype, residual_dtype
        )
        if residual_dtype is None or residual_dtype == x_dtype:
            dresidual = None if residual_dtype is None else dx
        return dx, dweight, None if bias is None else dbias, dresidual, None, None, None


register(
    "add_norm(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, float eps, bool centre, ScalarType? stored) "
    "-> (Tensor y, Tensor residual_out, Tensor mean, Tensor rstd)",  # empty for what is not asked for
    _native,
    _shapes,
)
register(
    "add_norm_backward(Tensor? dy, Tensor? dout, Tensor first, Tensor? second, Tensor weight, Tensor? bias, Tensor? mean, "
    "Tensor rstd, ScalarType x_dtype, ScalarType? residual_dtype) "
    "-> (Tensor dx, Tensor dresidual, Tensor dweight, Tensor dbias)",  # dresidual is empty where dx serves for both
    _native_backward,
    _shapes_backward,
)
_differentiable = differentiable("add_norm", _Native)


def _sum(x: Tensor, residual: Tensor | None) -> Tensor:
    v = x.to(accumulation_dtype(x.dtype))
    return v if residual is None else v + residual.to(v.dtype)


def _check(x, weight, bias, residual, kind) -> None:
    op = "add_norm"
    if isinstance(x, Tensor) and x.dim() == 0:
        raise ValueError(f"{op}: x must have at least one dimension, got a scalar")
    letters = " ".join(["B"] * (x.dim() - 1) + ["D"]) if isinstance(x, Tensor) else "B D"
    check_tensor(op, "x", x, letters, {}, None)
    sizes = {"D": x.shape[-1]}
    check_tensor(op, "weight", weight, "D", sizes, x.device)
    if bias is not None:
        check_tensor(op, "bias", bias, "D", sizes, x.device)
    if residual is not None:
        check_tensor(op, "residual", residual, letters, sizes, x.device)
        if residual.shape != x.shape:
            raise ValueError(f"{op}: residual must have x's shape {tuple(x.shape)}, got {tuple(residual.shape)}")
    check_choice(op, "kind", kind, KINDS)
