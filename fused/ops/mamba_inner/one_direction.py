"""One direction of a mixer over a chunk, from state to state, as one operator, `videomamba::walk`.

    c = silu(conv(x))        dt, B, C = x_proj(c)        y = (scan + beside) * silu(z)

`beside` is what the other direction has made of the same tokens, so that a video in chunks needs no pass to join them. What
the backward wants is kept: it follows at once, or after a frame.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fused.ops.causal_conv1d import launch as conv
from fused.ops.mamba_inner.gate_kernel import gate
from fused.ops.mamba_inner.native import PACKED, Parts, packed
from fused.ops.mamba_inner.pack_kernel import Packed
from fused.ops.selective_scan import launch as scan
from fused.ops.selective_scan.native import whole
from fused.runtime.library import below_autograd, differentiable, register, wants_gradients
from fused.runtime.modes import is_batch_invariant

_TENSORS = (
    "Tensor x, Tensor? z, Tensor? beside, Tensor? taps, Tensor? state, Tensor conv, Tensor? conv_bias, Tensor proj, Tensor dt,"
    " Tensor dt_bias, Tensor A, Tensor D, Tensor? packed_proj, Tensor? packed_dt"
)
_PARAMETERS, _GRADIENTS, _COUNT = 5, 12, 14  # the first of the parameters, all that has a gradient, all


def walk(
    x: Tensor, z: Tensor | None, beside: Tensor | None, state: Any, own: dict[str, Any], *, reverse: bool, logarithm: bool,
    packed: Sequence[Tensor | None] = (None, None),
) -> tuple[Tensor, tuple[Tensor, Tensor]]:  # fmt: skip
    """y (B, L, E) of x (B, L, E) and the state that leaves: taps (B, E, K-1) in x's dtype, and (B, E, N) float32.

    `own` are the parameters as `mix` takes them; A is itself, or with `logarithm` the logarithm of -A. z, the gate, and
    `beside`, which needs z, are (B, L, E). `packed` is what `once` made of `own`, whose A and D then are float32.
    """
    low = torch.is_autocast_enabled(x.device.type)
    taps, edge = state or (None, None)
    proj, dt = (own[name].to(x.dtype) if low else own[name] for name in ("proj", "dt"))
    parameters = (own["conv"], own["conv_bias"], proj, dt, own["dt_bias"], own["A"], own["D"], *packed)
    tensors = (x, z, beside, taps, None if edge is None else edge.float(), *parameters)
    y, taps, edge, *_ = _differentiable(*tensors, reverse, logarithm, is_batch_invariant(), wants_gradients(*tensors))
    return y, (taps, edge)


def once(own: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """What every walk with these parameters would make of them each way."""
    proj, dt, *_ = packed(*([own[name]] for name in PACKED))
    return proj, dt


def _parts(tensors: Any, reverse: bool, logarithm: bool, even: bool) -> Parts:
    x, z = tensors[:2]
    return Parts(x, z, [(t,) for t in tensors[_PARAMETERS:_GRADIENTS]], (reverse,), even, logarithm)


def _weights(p: Parts, tensors: Any) -> Packed:
    proj, dt = tensors[_GRADIENTS:]
    return p.weights() if proj is None else Packed(proj, dt, p.A, p.D)


def _walk(*args):
    *tensors, reverse, logarithm, even, keep = args
    _, _, beside, taps, state = tensors[:_PARAMETERS]
    p, nothing = _parts(tensors, reverse, logarithm, even), tensors[0].new_empty
    c, leaving = conv.forward(p.x, p.conv, p.conv_bias, (taps,), p.reverses, True)
    assert leaving is not None
    rows, delta, s = p.read(c, _weights(p, tensors))
    r = scan.forward(s, whole(state), p.plan, keep=keep, beside=whole(beside))
    ungated = r.ungated if keep and p.z is not None else nothing(0)
    kept = (c, rows, delta, ungated, r.marks) if keep else (*(nothing(0) for _ in range(4)), r.final.new_empty(0))
    return r.y, leaving[0], r.final[0], *kept


def _shapes(*args):
    *tensors, reverse, logarithm, even, keep = args
    p, empty = _parts(tensors, reverse, logarithm, even), tensors[0].new_empty
    (B, L, E), precise = p.x.shape, partial(empty, dtype=torch.float32)
    kept = [(1, B, L, E), (1, B, L, p.width), (1, B, L, E), (B, L, E) if p.z is not None else 0]
    marks = precise((1, B, -(-L // scan.TILE), E, p.N) if keep else 0)
    shapes = kept if keep else [0] * 4
    return empty((B, L, E)), empty((B, E, p.conv[0].shape[1] - 1)), precise((B, E, p.N)), *map(empty, shapes), marks


def _walk_backward(dy, dtaps, dstate, c, rows, delta, ungated, marks, *args):
    *tensors, reverse, logarithm, even = args
    x, z, beside, taps, state = tensors[:_PARAMETERS]
    p, nothing = _parts(tensors, reverse, logarithm, even), x.new_empty
    weights = _weights(p, tensors)
    s = p.streams(c, rows, delta, weights)
    dx, g, (dentering,), made = p.gradients(
        s, c, rows, weights, dy, marks, None if z is None else ungated, None, None, whole(dstate), (taps,), (dtaps,)
    )
    return (
        dx, nothing(0) if z is None else g.z, nothing(0) if beside is None or s.z is None else gate(dy, s.z),
        nothing(0) if taps is None else dentering, g.initial.new_empty(0) if state is None else g.initial[0].clone(),
        *(pair[0] for pair in made),
    )  # fmt: skip


def _shapes_backward(dy, dtaps, dstate, c, rows, delta, ungated, marks, *args):
    return tuple(dy.new_empty(0) if t is None else t.new_empty(t.shape) for t in args[:_GRADIENTS])


class _Walk(torch.autograd.Function):
    """Saves its tensors and all that it made."""

    @staticmethod
    def forward(ctx, *inputs):
        *tensors, reverse, logarithm, even, _ = inputs
        ctx.options = reverse, logarithm, even
        y, taps, edge, *kept = below_autograd("walk", *inputs)
        ctx.mark_non_differentiable(*kept)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*kept, *tensors)
        return y, taps, edge, *kept

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dtaps, dstate, *_):
        saved = ctx.saved_tensors
        kept, tensors = saved[:-_COUNT], saved[-_COUNT:]
        dy = torch.zeros_like(tensors[0]) if dy is None else dy.contiguous()
        grads = torch.ops.videomamba.walk_backward.default(dy, dtaps, dstate, *kept, *tensors, *ctx.options)
        made = (None if t is None else g for g, t in zip(grads, tensors[:_GRADIENTS], strict=True))
        return *made, *[None] * (_COUNT - _GRADIENTS + len(ctx.options) + 1)


register(
    f"walk({_TENSORS}, bool reverse, bool logarithm, bool invariant, bool keep) -> (" + ", ".join(["Tensor"] * 8) + ")",
    _walk,
    _shapes,
)
register(
    "walk_backward(Tensor dy, Tensor? dtaps, Tensor? dstate, Tensor c, Tensor rows, Tensor delta, Tensor ungated,"
    f" Tensor marks, {_TENSORS}, bool reverse, bool logarithm, bool invariant) -> (" + ", ".join(["Tensor"] * _GRADIENTS) + ")",
    _walk_backward,
    _shapes_backward,
)  # fmt: skip
_differentiable = differentiable("walk", _Walk)
