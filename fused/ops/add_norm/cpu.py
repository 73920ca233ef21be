"""Addition and norm by the kernels for CPUs, as the operator `videomamba::add_norm_cpu`."""

import struct
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fused.ops.add_norm.eager import add_norm_eager
from fused.ops.shapes import Rows, residual_dtype_of
from fused.runtime import cpu_library
from fused.runtime.autocast import no_autocast
from fused.runtime.dtypes import accumulation_dtype
from fused.runtime.elementwise import cast
from fused.runtime.exporting import is_exporting
from fused.runtime.library import apply_function, below_autograd, register

TILE = 32  # rows, as in cpu.cpp


def add_norm_cpu(
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
    """Add and normalise as `fused.add_norm` says, on a CPU."""
    options: dict[str, Any] = {"eps": eps, "kind": kind, "prenorm": prenorm, "residual_in_fp32": residual_in_fp32}
    if is_exporting():
        return add_norm_eager(x, weight, bias, residual=residual, **options)
    precise = accumulation_dtype(x.dtype)
    with no_autocast(x.device):
        inputs = [None if t is None else cast(t, precise) for t in (x, residual, weight, bias)]
        y, v, _, _ = _add_norm(*inputs, eps, kind == "layer")
        y = cast(y, x.dtype)
        return (y, cast(v, residual_dtype_of(x, residual, residual_in_fp32))) if prenorm else y


def _struct(
    v: Tensor, x: Tensor | None, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, centre: bool,
    y: Tensor | None, mean: Tensor, scale: Tensor,
) -> tuple[Any, ...]:  # fmt: skip
    """Return the members of the kernel's `Norm`; all tensors are contiguous."""
    D = weight.shape[0]
    (eps_bits,) = struct.unpack("q", struct.pack("d", eps))
    rows = v.numel() // D if D else 0
    return rows, D, centre, torch.get_num_threads(), eps_bits, x, residual, weight, bias, y, v, mean, scale


def _forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, centre: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return y and v (..., D), and the mean, if the norm is centred, and scale (...) of each row."""
    y, v, mean, scale = _forward_shapes(x, residual, weight, bias, eps, centre)
    inputs: Any = (None if t is None else t.contiguous() for t in (x, residual, weight, bias))
    cpu_library.call("norm_forward", x.dtype, _struct(*(v, *inputs, eps, centre, y, mean, scale)))
    return y, v, mean, scale


def _forward_shapes(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, centre: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = x.shape[:-1]
    return x.new_empty(x.shape), x.new_empty(x.shape), x.new_empty(rows if centre else 0), x.new_empty(rows)


def _backward(
    v: Tensor, weight: Tensor, bias: Tensor | None, mean: Tensor, scale: Tensor, centre: bool, dy: Tensor, dv: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the gradients of v, weight and bias, for those of y and, unless it is None, of v as a result."""
    dx, dweight, dbias = v.new_empty(v.shape), weight.new_empty(weight.shape), None
    dbias = None if bias is None else bias.new_empty(bias.shape)
    weight = weight.contiguous()
    members = _struct(v, None, None, weight, None, 0.0, centre, None, mean, scale)
    by_tile = v.new_empty(-(-members[0] // TILE) * 2 * members[1])
    dy, dv = dy.contiguous(), None if dv is None else dv.contiguous()
    cpu_library.call("norm_backward", v.dtype, members, (dy, dv, dx, dweight, dbias, by_tile))
    return dx, dweight, dbias


def _backward_shapes(
    v: Tensor, weight: Tensor, bias: Tensor | None, mean: Tensor, scale: Tensor, centre: bool, dy: Tensor, dv: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    return v.new_empty(v.shape), weight.new_empty(weight.shape), weight.new_empty(0 if bias is None else bias.shape)


class _AddNorm(torch.autograd.Function):
    """Autograd of the operator. It saves v, and mean and scale of each row."""

    @classmethod
    def call(cls, *arguments: Any) -> Any:
        """Apply to the arguments of the operator."""
        return apply_function(cls, *arguments)

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, centre: bool
    ) -> tuple[Tensor, ...]:
        operator = torch.ops.videomamba.add_norm_cpu.default
        y, v, mean, scale = below_autograd(operator, x, residual, weight, bias, eps, centre)
        ctx.centre, ctx.adds = centre, residual is not None
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(mean, scale)
        ctx.save_for_backward(v, weight, bias, mean, scale)
        return y, v, mean, scale

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dv: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        v, weight, bias, mean, scale = ctx.saved_tensors
        dweight = dbias = None
        if dy is not None:
            dv, dweight, dbias = _add_norm_backward(v, weight, bias, mean, scale, ctx.centre, dy, dv)
        return dv, dv if ctx.adds else None, dweight, None if bias is None else dbias, None, None


_add_norm_backward = register(
    "add_norm_cpu_backward(Tensor v, Tensor weight, Tensor? bias, Tensor mean, Tensor scale, bool centre, Tensor dy, "
    "Tensor? dv) -> (Tensor dx, Tensor dweight, Tensor dbias)",  # dbias is empty without bias
    _backward,
    _backward_shapes,
)
_add_norm = register(
    "add_norm_cpu(Tensor x, Tensor? residual, Tensor weight, Tensor? bias, float eps, bool centre) -> "
    "(Tensor y, Tensor v, Tensor mean, Tensor scale)",
    _forward,
    _forward_shapes,
    autograd=_AddNorm.call,
)
