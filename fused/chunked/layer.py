"""One layer over a video in chunks; in memory are one chunk, the streams between layers, and one y.

    right to left:   y_b = backward scan of x, its state carried from chunk to chunk
    left to right:   y_f = forward scan of x, likewise;  hidden = out_proj((y_f + y_b) * silu(z))

with x, z = in_proj(norm(residual + hidden)), computed in both passes. Where native kernels split the scan, the first pass makes
the backward scan's states but no y_b, and keeps the norm's result, which is half as wide; the second runs both scans at once.
In training a layer keeps the sum that its norm saw and the forward scan's states between chunks. The gradient, its sums over
chunks in at least float32:

    right to left:   both scans again, then the adjoint of the gate and of the forward scan
    left to right:   the backward scan again and its adjoint, then those of in_proj and of the norm
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fused.chunked.layer_ops import (
    add_norm,
    norm_backward,
    norm_forward,
    norm_recompute,
    project,
    project_backward,
    project_into,
    scan_chunk,
)
from fused.chunked.layer_weights import LayerParameters, LayerSpec, LayerWeights, layer_spec
from fused.modules.state import State
from fused.runtime.autocast import no_autocast
from fused.runtime.library import wants_gradients

if TYPE_CHECKING:
    from fused.chunked.protocol import ChunkableLayer


def run_block_two_pass(
    layer: "ChunkableLayer", hidden: Tensor, residual: Tensor | None, chunks: Sequence[slice], backend: str,
    offload: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the new (hidden, residual), both (B, L, D), as `Block.forward` does after its drop_path, for tokens as stored.

    `chunks` cut the tokens, in the order of time; `backend` is one that carries states. `offload` keeps the tensors that
    the first pass leaves for the second in host memory. Without gradients, results are written into `hidden` and `residual`
    where their dtypes allow it: neither must be used again.
    """
    parameters = LayerParameters.of(layer)
    spec = layer_spec(layer, parameters, hidden, residual, chunks, backend, offload)
    flat = parameters.flat()
    if wants_gradients(hidden, residual, *flat):
        return _Layer.apply(spec, hidden, residual, *flat)
    with torch.no_grad(), no_autocast(hidden.device):
        stream = hidden if residual is None else residual
        stored = stream if stream.dtype == spec.residual_dtype else torch.empty_like(hidden, dtype=spec.residual_dtype)
        reuse_hidden = hidden is not stored and hidden.dtype == spec.matmul_dtype
        out = hidden if reuse_hidden else torch.empty_like(hidden, dtype=spec.matmul_dtype)
        _forward(spec, LayerWeights(spec, parameters), hidden, residual, out, stored)
    return out, stored


def _forward(
    spec: LayerSpec, w: LayerWeights, hidden: Tensor, residual: Tensor | None, out: Tensor, stored: Tensor,
    summed: Tensor | None = None,
) -> list[State]:  # fmt: skip
    """Fill `out` (the new hidden), `stored` (the new residual) and `summed` (the sum before it is stored), all (B, L, D).

    Returns the forward scan's states between chunks if `summed` is wanted. `out` and `stored` may be `hidden` and `residual`:
    a chunk is written after its last read.
    """
    if (mixer := _two_pass_mixer(spec, w, hidden)) is not None:
        return _forward_two_pass(spec, w, mixer, hidden, residual, out, stored, summed)
    chunks, inner = list(enumerate(spec.chunks)), w.out_proj.weight.shape[1]
    states: list[State] = []
    ys: list[Tensor | None] = [None] * len(chunks)  # of the backward scan
    state: State | None = None
    if w.backward is not None:
        for i, c in reversed(chunks):
            normed = norm_forward(spec, w, hidden[:, c], None if residual is None else residual[:, c])
            y, state = scan_chunk(spec, w.backward, project(w.in_proj, normed, inner), state, reverse=True)
            ys[i] = _to_host(spec, y)
    state = None
    for i, c in chunks:
        normed = _add_norm_into(spec, w, hidden, residual, stored, summed, c)
        x, z = project(w.in_proj, normed).chunk(2, dim=-1)
        if summed is not None and state is not None:
            states.append(state)
        other, ys[i] = _to_device(ys[i], x.device), None
        y, state = scan_chunk(spec, w.forward, x, state, False, z, other)
        project_into(w.out_proj, y, out[:, c])
    return states


def _add_norm_into(
    spec: LayerSpec, w: LayerWeights, hidden: Tensor, residual: Tensor | None, stored: Tensor, summed: Tensor | None, c: slice
) -> Tensor:
    """Return in_proj's input (B, L, D) of chunk `c`, and write its sum into `stored` and `summed`."""
    out = None if stored is hidden else stored[:, c]  # else the sum is hidden itself: the first layer's residual stream
    normed, v = add_norm(spec, w, hidden[:, c], None if residual is None else residual[:, c], out)
    if out is not None and v is not out:
        out.copy_(v)
    if summed is not None and summed is not stored:
        summed[:, c] = v
    return normed


def _two_pass_mixer(spec: LayerSpec, w: LayerWeights, hidden: Tensor) -> Any:
    """Return a `TwoPassMixer` of the layer where native kernels split the scan over the first chunk, else None."""
    if spec.backend != "native" or w.backward is None:
        return None
    from fused.ops.mamba_inner.two_pass import TwoPassMixer

    mixer, first = TwoPassMixer([w.forward.weights, w.backward.weights]), spec.chunks[0]
    return mixer if mixer.pays(len(hidden), first.stop - first.start, hidden.device) else None


def _forward_two_pass(
    spec: LayerSpec, w: LayerWeights, mixer: Any, hidden: Tensor, residual: Tensor | None, out: Tensor, stored: Tensor,
    summed: Tensor | None,
) -> list[State]:  # fmt: skip
    """Run `_forward` with a pass for the backward scan's states; the sum of the norm is stored in that pass already."""
    from fused.ops.mamba_inner.two_pass import END_OF_VIDEO

    chunks, inner = list(enumerate(spec.chunks)), w.out_proj.weight.shape[1]
    waiting: list[Any] = [None] * len(chunks)  # the norm's result, and the states that the backward scan starts from
    states: list[State] = []
    before = END_OF_VIDEO
    for i, c in reversed(chunks):
        normed, entering = _add_norm_into(spec, w, hidden, residual, stored, summed, c), before
        if i:
            entering, before = mixer.backward_states(project(w.in_proj, normed, inner), entering)
        waiting[i] = _to_host(spec, normed), entering
    state: State | None = None
    for i, c in chunks:
        (normed, entering), waiting[i] = waiting[i], None
        if summed is not None and state is not None:
            states.append(state)
        y, state = mixer.run(project(w.in_proj, _to_device(normed, hidden.device)), state, entering)
        project_into(w.out_proj, y, out[:, c])
    return states


class _Layer(torch.autograd.Function):
    """Autograd of a layer. It saves the sum that the norm saw, the forward states between chunks, and the parameters."""

    @staticmethod
    def forward(
        ctx: Any, spec: LayerSpec, hidden: Tensor, residual: Tensor | None, *parameters: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.spec, ctx.count, ctx.dtypes = spec, len(parameters), (hidden.dtype, None if residual is None else residual.dtype)
        out, stored = (torch.empty_like(hidden, dtype=dtype) for dtype in (spec.matmul_dtype, spec.residual_dtype))
        summed = stored if spec.residual_dtype == spec.sum_dtype else torch.empty_like(hidden, dtype=spec.sum_dtype)
        with no_autocast(hidden.device):
            w = LayerWeights(spec, LayerParameters.from_flat(parameters))
            states = _forward(spec, w, hidden, residual, out, stored, summed)
        ctx.save_for_backward(summed, *(x for state in states for x in state), *parameters)
        return out, stored

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dstored: Tensor | None) -> tuple[Tensor | None, ...]:
        summed, *saved = ctx.saved_tensors  # read once: activation checkpointing recomputes them at every access
        states, parameters = saved[: -ctx.count], saved[-ctx.count :]
        grads: list[Tensor | None] = [None] * ctx.count
        dsummed = dstored
        if dout is not None:  # else the residual alone was used
            entering = [None, *zip(states[::2], states[1::2], strict=True)]
            with no_autocast(summed.device):
                w = LayerWeights(ctx.spec, LayerParameters.from_flat(parameters)).requires_grad()
                dsummed = _backward(ctx.spec, w, summed, entering, dout, dstored)
                grads = w.gradients()
        return None, *(None if dsummed is None or dtype is None else dsummed.to(dtype) for dtype in ctx.dtypes), *grads


def _backward(
    spec: LayerSpec, w: LayerWeights, summed: Tensor, forward_states: Sequence[State | None], dout: Tensor,
    dstored: Tensor | None,
) -> Tensor:  # fmt: skip
    """Return the gradient of the sum that the norm saw (B, L, D); those of the parameters are added to `w`."""
    chunks, inner = list(enumerate(spec.chunks)), w.out_proj.weight.shape[1]
    waiting: list[Any] = [None] * len(chunks)  # of every chunk: gradients of x, z, and for the backward scan of its y
    backward_states: list[State | None] = [None] * len(chunks)
    state: State | None = None
    dstate: Sequence[Tensor] = ()
    for i, c in reversed(chunks):
        normed, _ = norm_recompute(spec, w, summed[:, c])
        x, z = (t.requires_grad_() for t in project(w.in_proj, normed).chunk(2, dim=-1))
        other: list[Tensor] = []
        if w.backward is not None:
            backward_states[i] = state
            y, state = scan_chunk(spec, w.backward, x, state, reverse=True)
            other = [y.requires_grad_()]
        start = _leaves(forward_states[i])
        with torch.enable_grad():
            y, last = scan_chunk(spec, w.forward, x, start, False, z, *other)
        dy = project_backward(w, w.out_proj, y.detach(), dout[:, c])
        dx, dz, *rest = chunk_gradients(w, (y, *last), (dy, *dstate), (x, z, *other, *start), w.forward.tensors)
        dother, dstate = rest[: len(other)], rest[len(other) :]
        waiting[i] = [_to_host(spec, t) for t in (dx, dz, *dother)]
    dsummed, dstate = torch.empty_like(summed), ()
    for i, c in chunks:
        v = summed[:, c]
        normed, kept = norm_recompute(spec, w, v)
        (dx, dz, *dother), waiting[i] = (_to_device(t, v.device) for t in waiting[i]), None
        if w.backward is not None:
            x, start = project(w.in_proj, normed, inner).requires_grad_(), _leaves(backward_states[i])
            with torch.enable_grad():
                y, last = scan_chunk(spec, w.backward, x, start, reverse=True)
            dx_backward, *dstate = chunk_gradients(w, (y, *last), (*dother, *dstate), (x, *start), w.backward.tensors)
            dx += dx_backward
        dy = project_backward(w, w.in_proj, normed, torch.cat((dx, dz), dim=-1))
        norm_backward(spec, w, v, kept, dy, None if dstored is None else dstored[:, c], dsummed[:, c])
    return dsummed


def chunk_gradients(
    w: LayerWeights, outputs: Sequence[Tensor], grads: Sequence[Tensor], inputs: Sequence[Tensor], weights: Sequence[Tensor]
) -> list[Tensor]:
    """Return the gradients of the inputs; those of the weights are added to `w`.

    Outputs beyond the last of `grads` have no gradient.
    """
    found = torch.autograd.grad(outputs[: len(grads)], (*inputs, *weights), grads)
    for x, grad in zip(weights, found[len(inputs) :], strict=True):
        w.add_gradient(x, grad)
    return list(found[: len(inputs)])


def _leaves(state: State | None) -> tuple[Tensor, ...]:
    return () if state is None else tuple(x.detach().requires_grad_() for x in state)


def _to_host(spec: LayerSpec, x: Tensor) -> Tensor:
    """Return x, with `offload` as a copy in pinned host memory, made in the order of the device's stream without waiting."""
    return x.to("cpu", non_blocking=True) if spec.offload else x


def _to_device(x: Tensor | None, device: torch.device) -> Any:
    return None if x is None else x.to(device, non_blocking=True)
