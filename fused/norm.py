"""Add and normalise: what stands between two mixers, on the residual stream.

    v = x + residual
    y = v / sqrt(mean(v^2) + eps) * weight + bias                             kind "rms"
    y = (v - mean(v)) / sqrt(mean((v - mean(v))^2) + eps) * weight + bias     kind "layer"

The means are over the last dimension, and y comes from v before v is rounded for storage.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import backends, upstream
from .arguments import check_choice, check_tensor, no_autocast

KINDS = ("rms", "layer")
Rows = Float[Tensor, "*B D"]


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
    backends.check_abilities("norm", backend, x.dtype, {})
    chosen = backends.choose(backend, x.device)
    run = upstream.add_norm if chosen in ("mamba_ssm", "mamba_ssm_inner") else norm_torch
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
    precise = torch.promote_types(x.dtype, torch.float32)
    stored = residual.dtype if residual is not None else precise if residual_in_fp32 else x.dtype
    y, residual_out = _AddNorm.apply(x, weight, bias, residual, eps, kind == "layer", stored if prenorm else None)
    return (y, residual_out) if prenorm else y


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


def _sum(x: Tensor, residual: Tensor | None) -> Tensor:
    v = x.to(torch.promote_types(x.dtype, torch.float32))
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
