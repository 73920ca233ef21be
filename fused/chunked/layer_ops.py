"""What one layer does to one chunk of a video: its parameters as the operators take them, and the steps between two states."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fused import backends
from fused.models.videomamba.block import Block
from fused.modules.mamba import State
from fused.ops.add_norm import api as norm
from fused.ops.causal_conv1d import api as conv
from fused.ops.selective_scan import api as scan
from fused.runtime.dtypes import accumulation_dtype
from fused.runtime.elementwise import clipwise


@dataclass(frozen=True)
class Plan:
    """All of a layer that is no tensor. Dtypes: `product` of matrix products, `normed` of the norm's result, `stored` of
    the residual stream, `wide` of the sum before it is stored, at least float32."""

    chunks: Sequence[slice]  # of tokens, in the order of time
    backend: str
    offload: bool
    kind: str
    eps: float
    fused_add_norm: bool
    R: int
    N: int
    product: torch.dtype
    normed: torch.dtype
    stored: torch.dtype
    wide: torch.dtype


def plan_of(
    layer: Block, hidden: Tensor, residual: Tensor | None, chunks: Sequence[slice], backend: str, offload: bool
) -> Plan:
    """The plan of a layer for these streams, under the autocast of the caller."""
    mixer, device, fused = layer.mixer, hidden.device.type, layer.fused_add_norm
    weights = mixer.in_proj.weight.dtype
    low = torch.is_autocast_enabled(device) and weights != torch.float64
    summed = hidden.dtype if residual is None else torch.promote_types(hidden.dtype, residual.dtype)
    if residual is not None and fused:
        stored = residual.dtype
    else:
        stored = accumulation_dtype(summed) if layer.residual_in_fp32 else summed
    return Plan(
        chunks, backends.operators_of(backend), offload, layer.norm.kind, layer.norm.eps, fused, mixer.dt_rank, mixer.d_state,
        product=torch.get_autocast_dtype(device) if low else weights,
        normed=hidden.dtype if fused else layer.norm.weight.dtype,
        stored=stored, wide=accumulation_dtype(summed),
    )  # fmt: skip


def parameters_of(layer: Block) -> list[Tensor | None]:
    """Of the norm, both projections and every direction, as `Weights` takes them."""
    mixer = layer.mixer
    flat: list[Tensor | None] = [layer.norm.weight, layer.norm.bias]
    for product in (mixer.in_proj, mixer.out_proj):
        flat += [product.weight, product.bias]
    for own in mixer._directions():
        taps, dt = own.conv, own.dt_proj
        flat += [taps.weight, taps.bias, own.x_proj.weight, dt.weight, dt.bias, own.A_log, own.D]
    return flat


@dataclass
class Direction:
    """One scan's weights: `A` is -exp(A_log), matrices are in the dtype of products, A and D at least float32."""

    conv: Tensor
    conv_bias: Tensor | None
    x_proj: Tensor
    dt_proj: Tensor
    dt_bias: Tensor
    A: Tensor
    D: Tensor

    @property
    def parameters(self) -> dict[str, Any]:
        """As the native operator takes them."""
        return dict(zip(("conv", "conv_bias", "proj", "dt", "dt_bias", "A", "D"), self._all(), strict=True))

    @cached_property
    def packed(self) -> tuple[Tensor, Tensor]:
        """What native walks make of the matrices, once for all chunks."""
        from fused.ops.mamba_inner.one_direction import once

        return once(self.parameters)

    @property
    def tensors(self) -> list[Tensor]:
        """Those that are there."""
        return [x for x in self._all() if x is not None]

    def _all(self) -> list[Any]:
        return [getattr(self, name) for name in _OWN]


_OWN = tuple(field.name for field in fields(Direction))
_NAMES = ("norm", "norm_bias", "into", "into_bias", "out", "out_bias", *_OWN, *_OWN)  # a causal layer has the first _OWN alone
_PRODUCTS = ("into", "into_bias", "out", "out_bias", "x_proj", "dt_proj")


class Weights:
    """A layer's parameters, cast once for all chunks, and the sums of their gradients over chunks."""

    def __init__(self, plan: Plan, parameters: Sequence[Tensor | None]) -> None:
        self._parameters = parameters
        self._sums: dict[int, Tensor] = {}  # by the id of what was cast
        cast: list[Any] = [_cast(plan, name, x) for name, x in zip(_NAMES, parameters, strict=False)]
        self._cast = cast
        self.norm, self.into, self.out = cast[:2], cast[2:4], cast[4:6]
        self.ahead = Direction(*cast[6:13])
        self.behind = Direction(*cast[13:]) if len(cast) > 13 else None

    def differentiable(self) -> "Weights":
        """The same, every one a leaf."""
        for x in self._cast:
            if x is not None:
                x.requires_grad_()
        return self

    def add(self, x: Tensor | None, grad: Tensor) -> None:
        """To the gradient of one of them, summed in at least float32."""
        if id(x) in self._sums:
            self._sums[id(x)].add_(grad)
        else:
            self._sums[id(x)] = grad.to(accumulation_dtype(grad.dtype), copy=True)

    def gradients(self) -> list[Tensor | None]:
        """Of the parameters, in their shapes and dtypes."""
        made: list[Tensor | None] = []
        for name, own, x in zip(_NAMES, self._parameters, self._cast, strict=False):
            total = self._sums.get(id(x))
            if own is None or total is None:
                made.append(None)
                continue
            total = total * x.detach() if name == "A" else total  # through A = -exp(A_log)
            made.append(total.view(own.shape).to(own.dtype))
        return made


def _cast(plan: Plan, name: str, x: Tensor | None) -> Tensor | None:
    """A parameter as the operators take it."""
    if x is None:
        return None
    x = x.detach()
    if name == "conv":
        return x.squeeze(1)
    if name in ("A", "D"):
        x = x.to(accumulation_dtype(x.dtype))
        return -x.exp() if name == "A" else x
    return x.to(plan.product) if name in _PRODUCTS else x


def add_norm(
    plan: Plan, w: Weights, hidden: Tensor, residual: Tensor | None, into: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(what in_proj reads, the sum before it is stored). The second is `into` where it can be written there by native kernels,
    within autograd's back; `into` may be `residual`."""
    if _native(plan) and into is not None and into.dtype == plan.wide and into.is_contiguous():
        weight, bias = w.norm
        return norm.norm_into(into, hidden, weight, bias, residual, eps=plan.eps, kind=plan.kind).to(plan.product), into
    if plan.fused_add_norm:
        residual = None if residual is None else residual.to(plan.wide)
        y, v = norm.add_norm(hidden, *w.norm, residual=residual, eps=plan.eps, kind=plan.kind, backend=plan.backend)
        return y.to(plan.product), v
    v = hidden if residual is None else residual + hidden
    return norm_only(plan, w, v), v.to(plan.wide)


def norm_only(plan: Plan, w: Weights, v: Tensor, residual: Tensor | None = None) -> Tensor:
    """The first of `add_norm`, without the second being stored; of the second, `v`, or of what is added up to it."""
    if plan.fused_add_norm:
        residual = None if residual is None else residual.to(plan.wide)
    else:
        v, residual = (v if residual is None else residual + v).to(plan.normed), None
    options: dict[str, Any] = {"eps": plan.eps, "kind": plan.kind, "prenorm": False, "backend": plan.backend}
    y: Any = norm.add_norm(v, *w.norm, residual=residual, **options)
    return y.to(plan.normed).to(plan.product)


def norm_again(plan: Plan, w: Weights, v: Tensor) -> tuple[Tensor, tuple[Any, Any]]:
    """`norm_only` of v, and what `norm_back` wants."""
    if _native(plan):
        from fused.ops.add_norm import kernels

        weight, bias = w.norm
        y, _, mean, rstd = kernels.forward(v, None, weight, bias, plan.eps, plan.kind == "layer", None, dtype=plan.normed)
        return y.to(plan.product), (mean, rstd)
    v = v.detach().requires_grad_()
    with torch.enable_grad():
        y = norm_only(plan, w, v)
    return y.detach(), (v, y)


def norm_back(
    plan: Plan, w: Weights, v: Tensor, kept: tuple[Any, Any], dy: Tensor, dinto: Tensor | None, place: Tensor
) -> None:
    """Write the gradient of v into `place`, `dinto` added if there is any; those of the parameters are added to `w`."""
    weight, bias = w.norm
    if _native(plan):
        from fused.ops.add_norm import kernels

        (mean, rstd), own = kept, place if place.is_contiguous() else None
        dv, _, dweight, dbias = kernels.backward(dy, dinto, v, None, weight, bias, mean, rstd, place.dtype, dx=own)
    else:
        leaf, y = kept
        dv, dweight, *rest = torch.autograd.grad(y, [x for x in (leaf, weight, bias) if x is not None], dy)
        dv, dbias = dv if dinto is None else dv + dinto, rest[0] if rest else None
    if dv is not place:
        place.copy_(dv)
    w.add(weight, dweight)
    if dbias is not None:
        w.add(bias, dbias)


def _native(plan: Plan) -> bool:
    """Whether the norm's own kernels can be called, past autograd: the sum that they see is not rounded."""
    return plan.backend == "native" and plan.fused_add_norm


def scan_chunk(
    plan: Plan, own: Direction, x: Tensor, state: Sequence[Tensor] | None, reverse: bool,
    z: Tensor | None = None, beside: Tensor | None = None,
) -> tuple[Tensor, State]:  # fmt: skip
    """One direction over a chunk from its state: y, and the state that leaves. With `z`, (y + beside) * silu(z), where
    `beside` is the other direction's y, if there is one."""
    if plan.backend == "native":
        from fused.ops.mamba_inner.one_direction import walk

        return walk(x, z, beside, state, own.parameters, reverse=reverse, logarithm=False, packed=own.packed)
    taps, edge = state or (None, None)
    c, taps = conv.causal_conv1d(x, own.conv, own.conv_bias, initial_state=taps, reverse=reverse, backend=plan.backend)
    dt, B, C = F.linear(c, own.x_proj).split((plan.R, plan.N, plan.N), dim=-1)
    y, edge = scan.selective_scan(
        c, F.linear(dt, own.dt_proj), own.A, B, C, own.D, None, own.dt_bias,
        initial_state=edge, reverse=reverse, backend=plan.backend,
    )  # fmt: skip
    return y if z is None else _gated(y, beside, z), (taps, edge)


def _gated(y: Tensor, beside: Tensor | None, z: Tensor) -> Tensor:
    """Computed in at least float32 and rounded once."""
    wide = accumulation_dtype(z.dtype)
    y = y.to(wide) if beside is None else y.to(wide) + beside
    return (y * clipwise(F.silu, z.to(wide))).to(z.dtype)


def project(weights: Sequence[Any], x: Tensor, first: int | None = None) -> Tensor:
    """A linear layer's outputs, or the `first` of them."""
    weight, bias = weights
    return F.linear(x, weight[:first], None if bias is None else bias[:first])


def project_into(weights: Sequence[Any], x: Tensor, out: Tensor) -> None:
    """A linear layer's outputs, written into `out`; behind autograd's back."""
    weight, bias = weights
    if not out.is_contiguous() or out.dtype != x.dtype:
        out.copy_(F.linear(x, weight, bias))
    elif bias is None:
        torch.mm(x.flatten(0, 1), weight.t(), out=out.flatten(0, 1))
    else:
        torch.addmm(bias, x.flatten(0, 1), weight.t(), out=out.flatten(0, 1))


def project_back(w: Weights, weights: Sequence[Any], x: Tensor, grad: Tensor) -> Tensor:
    """The gradient of x; those of the layer are added to `w`."""
    weight, bias = weights
    flat = grad.flatten(0, 1)
    w.add(weight, flat.t() @ x.flatten(0, 1))
    if bias is not None:
        w.add(bias, flat.sum(0))
    return grad @ weight
