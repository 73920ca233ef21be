"""The steps of one layer over one chunk of a video, between two states, with their gradients.

B clips, L tokens of the chunk, D width of the model, E width of the mixer.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fused.chunked.layer_weights import Direction, LayerSpec, LayerWeights
from fused.modules.state import State
from fused.ops.add_norm import api as norm
from fused.ops.mamba_inner.eager import one_direction_eager
from fused.ops.shapes import Linear
from fused.runtime.dtypes import accumulation_dtype
from fused.runtime.elementwise import clipwise


def add_norm(
    spec: LayerSpec, w: LayerWeights, hidden: Tensor, residual: Tensor | None, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return in_proj's input (B, L, D) and the sum hidden + residual (B, L, D) before it is stored.

    Native kernels write the sum into `out`, which may be `residual`, where its dtype and strides allow it.
    """
    if _has_native_norm(spec) and out is not None and out.dtype == spec.sum_dtype and out.is_contiguous():
        from fused.ops.add_norm import launch
        from fused.ops.add_norm.native import check_norm_arguments

        weight, bias = w.norm
        check_norm_arguments(hidden, weight, bias, residual)
        y, *_ = launch.forward(hidden, residual, weight, bias, spec.eps, spec.kind == "layer", out.dtype, out)
        return y.to(spec.matmul_dtype), out
    if spec.fused_add_norm:
        residual = None if residual is None else residual.to(spec.sum_dtype)
        y, v = norm.add_norm(hidden, *w.norm, residual=residual, eps=spec.eps, kind=spec.kind, backend=spec.backend)
        return y.to(spec.matmul_dtype), v
    v = hidden if residual is None else residual + hidden
    return norm_forward(spec, w, v), v.to(spec.sum_dtype)


def norm_forward(spec: LayerSpec, w: LayerWeights, v: Tensor, residual: Tensor | None = None) -> Tensor:
    """Return in_proj's input (B, L, D) for the sum v, or v + residual, which is not stored."""
    if spec.fused_add_norm:
        residual = None if residual is None else residual.to(spec.sum_dtype)
    else:
        v, residual = (v if residual is None else residual + v).to(spec.norm_dtype), None
    options: dict[str, Any] = {"eps": spec.eps, "kind": spec.kind, "prenorm": False, "backend": spec.backend}
    y: Any = norm.add_norm(v, *w.norm, residual=residual, **options)
    return y.to(spec.norm_dtype).to(spec.matmul_dtype)


def norm_recompute(spec: LayerSpec, w: LayerWeights, v: Tensor) -> tuple[Tensor, tuple[Any, Any]]:
    """Return `norm_forward` of v (B, L, D), and the tensors that `norm_backward` reads."""
    if _has_native_norm(spec):
        from fused.ops.add_norm import launch

        weight, bias = w.norm
        y, _, mean, rstd = launch.forward(v, None, weight, bias, spec.eps, spec.kind == "layer", None, dtype=spec.norm_dtype)
        return y.to(spec.matmul_dtype), (mean, rstd)
    v = v.detach().requires_grad_()
    with torch.enable_grad():
        y = norm_forward(spec, w, v)
    return y.detach(), (v, y)


def norm_backward(
    spec: LayerSpec, w: LayerWeights, v: Tensor, kept: tuple[Any, Any], dy: Tensor, dresidual: Tensor | None, dv: Tensor
) -> None:
    """Write the gradient of v (B, L, D), with `dresidual` added, into `dv`; those of the parameters are added to `w`."""
    weight, bias = w.norm
    if _has_native_norm(spec):
        from fused.ops.add_norm import launch

        (mean, rstd), out = kept, dv if dv.is_contiguous() else None
        grad_v, _, dweight, dbias = launch.backward(dy, dresidual, v, None, weight, bias, mean, rstd, dv.dtype, dx=out)
    else:
        leaf, y = kept
        grad_v, dweight, *rest = torch.autograd.grad(y, [x for x in (leaf, weight, bias) if x is not None], dy)
        grad_v, dbias = grad_v if dresidual is None else grad_v + dresidual, rest[0] if rest else None
    if grad_v is not dv:
        dv.copy_(grad_v)
    w.add_gradient(weight, dweight)
    if dbias is not None:
        w.add_gradient(bias, dbias)


def _has_native_norm(spec: LayerSpec) -> bool:
    """Return whether the native norm kernels can be called directly, without autograd: they see the unrounded sum."""
    return spec.backend == "native" and spec.fused_add_norm


def scan_chunk(
    spec: LayerSpec, direction: Direction, x: Tensor, state: Sequence[Tensor] | None, reverse: bool,
    z: Tensor | None = None, y_other_direction: Tensor | None = None,
) -> tuple[Tensor, State]:  # fmt: skip
    """Return y (B, L, E) of one direction over a chunk x (B, L, E) from `state`, and the state that leaves.

    With z (B, L, E) it is (y + y_other_direction) * silu(z), where `y_other_direction` is the other direction's y, if there is
    one.
    """
    if spec.backend == "native":
        from fused.ops.mamba_inner.one_direction import mamba_inner_one_direction

        return mamba_inner_one_direction(
            x, direction.weights, reverse=reverse, A_is_log=False, z=z, y_other_direction=y_other_direction, state=state,
            packed=direction.packed,
        )  # fmt: skip
    y, leaving = one_direction_eager(x, direction.weights, reverse=reverse, backend=spec.backend, state=state)
    return y if z is None else _gate(y, y_other_direction, z), leaving


def _gate(y: Tensor, y_other_direction: Tensor | None, z: Tensor) -> Tensor:
    """Return (y + y_other_direction) * silu(z), (B, L, E), computed in at least float32 and rounded once."""
    dtype = accumulation_dtype(z.dtype)
    y = y.to(dtype) if y_other_direction is None else y.to(dtype) + y_other_direction
    return (y * clipwise(F.silu, z.to(dtype))).to(z.dtype)


def project(linear: Linear, x: Tensor, first: int | None = None) -> Tensor:
    """Return a linear layer's outputs (B, L, out) of x (B, L, in), or the first `first` of them."""
    weight, bias = linear
    return F.linear(x, weight[:first], None if bias is None else bias[:first])


def project_into(linear: Linear, x: Tensor, out: Tensor) -> None:
    """Write a linear layer's outputs of x (B, L, in) into `out` (B, L, out), without autograd."""
    weight, bias = linear
    if not out.is_contiguous() or out.dtype != x.dtype:
        out.copy_(F.linear(x, weight, bias))
    elif bias is None:
        torch.mm(x.flatten(0, 1), weight.t(), out=out.flatten(0, 1))
    else:
        torch.addmm(bias, x.flatten(0, 1), weight.t(), out=out.flatten(0, 1))


def project_backward(w: LayerWeights, linear: Linear, x: Tensor, grad: Tensor) -> Tensor:
    """Return the gradient of x (B, L, in) for that of the outputs (B, L, out); those of the layer are added to `w`."""
    weight, bias = linear
    flat = grad.flatten(0, 1)
    w.add_gradient(weight, flat.t() @ x.flatten(0, 1))
    if bias is not None:
        w.add_gradient(bias, flat.sum(0))
    return grad @ weight
