"""One layer over a video in chunks, with no more of it in memory than a chunk, the streams between layers, and one y.

    right to left:   y_b = backward scan of x, its state carried from chunk to chunk
    left to right:   y_f = forward scan of x, likewise;  hidden = out_proj((y_f + y_b) * silu(z))

with x, z = in_proj(norm(residual + hidden)), computed in either walk. Where native kernels cut time, the first walk makes the
backward scan's states and no y_b, and keeps the norm's result, which is half as wide; the second is both scans at once. For
training a layer keeps the sum that its norm saw and the forward scan's states between chunks. The gradient, its sums over
chunks in at least float32:

    right to left:   both scans again, then the adjoint of the gate and of the forward scan
    left to right:   the backward scan again and its adjoint, then those of in_proj and of the norm
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fused.chunked.layer_ops import (
    Plan,
    Weights,
    add_norm,
    norm_again,
    norm_back,
    norm_only,
    parameters_of,
    plan_of,
    project,
    project_back,
    project_into,
    scan_chunk,
)
from fused.models.videomamba.block import Block
from fused.modules.mamba import State
from fused.runtime.checks import no_autocast
from fused.runtime.library import wants_gradients


def sweep(
    layer: Block, hidden: Tensor, residual: Tensor | None, chunks: Sequence[slice], backend: str, offload: bool = False
) -> tuple[Tensor, Tensor]:
    """What `Block.forward` does behind its drop_path, for tokens as stored: new (hidden, residual), both (B, L, D).

    `chunks` cut the tokens, in the order of time; `backend` is one that carries states. `offload` keeps what the
    first walk leaves for the second in host memory. Without gradients, results are written into `hidden` and `residual` where
    their dtypes allow it: neither must be used again.
    """
    plan, parameters = plan_of(layer, hidden, residual, chunks, backend, offload), parameters_of(layer)
    if wants_gradients(hidden, residual, *parameters):
        return _Layer.apply(plan, hidden, residual, *parameters)
    with torch.no_grad(), no_autocast(hidden.device):
        stream = hidden if residual is None else residual
        into = stream if stream.dtype == plan.stored else torch.empty_like(hidden, dtype=plan.stored)
        free = hidden is not into and hidden.dtype == plan.product
        out = hidden if free else torch.empty_like(hidden, dtype=plan.product)
        _forward(plan, Weights(plan, parameters), hidden, residual, out, into)
    return out, into


def _forward(
    plan: Plan, w: Weights, hidden: Tensor, residual: Tensor | None, out: Tensor, into: Tensor, seen: Tensor | None = None
) -> list[State]:
    """Fill `out` (hidden), `into` (residual) and `seen` (the unrounded sum; None: not wanted); the forward states between
    chunks, if `seen` is wanted. `out` and `into` may be `hidden` and `residual`: what is written was read for the last time.
    """
    if (mixer := _by_states(plan, w, hidden)) is not None:
        return _forward_by_states(plan, w, mixer, hidden, residual, out, into, seen)
    chunks = list(enumerate(plan.chunks))
    starts: list[State] = []
    behind: list[Tensor | None] = [None] * len(chunks)
    state: State | None = None
    if w.behind is not None:
        for i, c in reversed(chunks):
            y = norm_only(plan, w, hidden[:, c], None if residual is None else residual[:, c])
            y, state = scan_chunk(plan, w.behind, project(w.into, y, w.out[0].shape[1]), state, reverse=True)
            behind[i] = _away(plan, y)
    state = None
    for i, c in chunks:
        x, z = project(w.into, _normed(plan, w, hidden, residual, into, seen, c)).chunk(2, dim=-1)
        if seen is not None and state is not None:
            starts.append(state)
        other, behind[i] = _back(behind[i], x.device), None
        y, state = scan_chunk(plan, w.ahead, x, state, False, z, other)
        project_into(w.out, y, out[:, c])
    return starts


def _normed(
    plan: Plan, w: Weights, hidden: Tensor, residual: Tensor | None, into: Tensor, seen: Tensor | None, c: slice
) -> Tensor:
    """What in_proj reads of a chunk, whose sum goes to `into` and `seen`."""
    place = None if into is hidden else into[:, c]  # else it is the tokens, which the first layer's residual stream is
    y, v = add_norm(plan, w, hidden[:, c], None if residual is None else residual[:, c], place)
    if place is not None and v is not place:
        place.copy_(v)
    if seen is not None and seen is not into:
        seen[:, c] = v
    return y


def _by_states(plan: Plan, w: Weights, hidden: Tensor) -> Any:
    """What walks by states, if native kernels cut the time of the first chunk."""
    if plan.backend != "native" or w.behind is None:
        return None
    from fused.ops.mamba_inner.two_pass import Mixer

    mixer, first = Mixer([w.ahead.parameters, w.behind.parameters]), plan.chunks[0]
    return mixer if mixer.suits(len(hidden), first.stop - first.start, hidden.device) else None


def _forward_by_states(
    plan: Plan, w: Weights, mixer: Any, hidden: Tensor, residual: Tensor | None, out: Tensor, into: Tensor, seen: Tensor | None
) -> list[State]:
    """`_forward`, the sum of the norm being stored in the first walk already."""
    chunks, inner = list(enumerate(plan.chunks)), w.out[0].shape[1]
    waiting: list[Any] = [None] * len(chunks)  # the norm's result, and what the backward scan starts from
    starts: list[State] = []
    entering = mixer.nothing
    for i, c in reversed(chunks):
        y, own = _normed(plan, w, hidden, residual, into, seen, c), entering
        if i:
            own, entering = mixer.behind(project(w.into, y, inner), own)
        waiting[i] = _away(plan, y), own
    state: State | None = None
    for i, c in chunks:
        (y, own), waiting[i] = waiting[i], None
        if seen is not None and state is not None:
            starts.append(state)
        y, state = mixer.mix(project(w.into, _back(y, hidden.device)), state, own)
        project_into(w.out, y, out[:, c])
    return starts


class _Layer(torch.autograd.Function):
    """Saves the sum that the norm saw, the forward states between chunks, and the parameters."""

    @staticmethod
    def forward(ctx, plan, hidden, residual, *parameters):
        ctx.set_materialize_grads(False)
        ctx.plan, ctx.count, ctx.dtypes = plan, len(parameters), (hidden.dtype, None if residual is None else residual.dtype)
        out, into = (torch.empty_like(hidden, dtype=dtype) for dtype in (plan.product, plan.stored))
        seen = into if plan.stored == plan.wide else torch.empty_like(hidden, dtype=plan.wide)
        with no_autocast(hidden.device):
            starts = _forward(plan, Weights(plan, parameters), hidden, residual, out, into, seen)
        ctx.save_for_backward(seen, *(x for state in starts for x in state), *parameters)
        return out, into

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, dinto):
        seen, *saved = ctx.saved_tensors  # once: a checkpoint gives them out once
        states, parameters = saved[: -ctx.count], saved[-ctx.count :]
        grads: list[Tensor | None] = [None] * ctx.count
        dseen = dinto
        if dout is not None:  # else the residual alone was used
            starts = [None, *zip(states[::2], states[1::2], strict=True)]
            with no_autocast(seen.device):
                w = Weights(ctx.plan, parameters).differentiable()
                dseen = _backward(ctx.plan, w, seen, starts, dout, dinto)
                grads = w.gradients()
        return None, *(None if dseen is None or dtype is None else dseen.to(dtype) for dtype in ctx.dtypes), *grads


def _backward(
    plan: Plan, w: Weights, seen: Tensor, starts: Sequence[State | None], dout: Tensor, dinto: Tensor | None
) -> Tensor:
    """The gradient of the sum that the norm saw; those of the parameters are added to `w`."""
    chunks = list(enumerate(plan.chunks))
    waiting: list[Any] = [None] * len(chunks)  # of every chunk: gradients of x, z, and for the backward scan of its y
    entering: list[State | None] = [None] * len(chunks)
    state: State | None = None
    dstate: Sequence[Tensor] = ()
    for i, c in reversed(chunks):
        x, z = (t.requires_grad_() for t in project(w.into, norm_again(plan, w, seen[:, c])[0]).chunk(2, dim=-1))
        behind: list[Tensor] = []
        if w.behind is not None:
            entering[i] = state
            y, state = scan_chunk(plan, w.behind, x, state, reverse=True)
            behind = [y.requires_grad_()]
        start = _leaves(starts[i])
        with torch.enable_grad():
            y, last = scan_chunk(plan, w.ahead, x, start, False, z, *behind)
        dy = project_back(w, w.out, y.detach(), dout[:, c])
        dx, dz, *rest = _gradients(w, (y, *last), (dy, *dstate), (x, z, *behind, *start), w.ahead.tensors)
        dbehind, dstate = rest[: len(behind)], rest[len(behind) :]
        waiting[i] = [_away(plan, t) for t in (dx, dz, *dbehind)]
    dseen, dstate = torch.empty_like(seen), ()
    for i, c in chunks:
        v = seen[:, c]
        y, kept = norm_again(plan, w, v)
        (dx, dz, *dbehind), waiting[i] = (_back(t, v.device) for t in waiting[i]), None
        if w.behind is not None:
            x, start = project(w.into, y, w.out[0].shape[1]).requires_grad_(), _leaves(entering[i])
            with torch.enable_grad():
                out, last = scan_chunk(plan, w.behind, x, start, reverse=True)
            own, *dstate = _gradients(w, (out, *last), (*dbehind, *dstate), (x, *start), w.behind.tensors)
            dx += own
        dy = project_back(w, w.into, y, torch.cat((dx, dz), dim=-1))
        norm_back(plan, w, v, kept, dy, None if dinto is None else dinto[:, c], dseen[:, c])
    return dseen


def _gradients(
    w: Weights, outputs: Sequence[Tensor], grads: Sequence[Tensor], inputs: Sequence[Tensor], weights: Sequence[Tensor]
) -> list[Tensor]:
    """Of the inputs; those of the weights are added to `w`. Outputs beyond the last gradient have none."""
    given = torch.autograd.grad(outputs[: len(grads)], (*inputs, *weights), grads)
    for x, grad in zip(weights, given[len(inputs) :], strict=True):
        w.add(x, grad)
    return list(given[: len(inputs)])


def _leaves(state: State | None) -> tuple[Tensor, ...]:
    return () if state is None else tuple(x.detach().requires_grad_() for x in state)


def _away(plan: Plan, x: Tensor) -> Tensor:
    """To host memory if that is wanted: pinned, and in the order of the device's stream, for which nobody waits."""
    return x.to("cpu", non_blocking=True) if plan.offload else x


def _back(x: Tensor | None, device: torch.device) -> Any:
    return None if x is None else x.to(device, non_blocking=True)
