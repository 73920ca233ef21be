"""A mixer from in_proj's output through out_proj, as one operator, `videomamba::mamba_inner`.

    c = silu(conv(x))        dt, B, C = x_proj(c)        y = sum of both scans * silu(z)        out = out_proj(y)

The forward keeps xz and x_proj's output. The backward recomputes everything else, and the scan unless its states are kept. Both
directions share one launch of the convolution, of x_proj, of dt_proj and of the scan, B and C are read where x_proj wrote them,
and the gradients of x and z are written straight into the gradient of xz.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fused.ops.mamba_inner.pipeline import Pipeline, pack, weight_gradient
from fused.ops.selective_scan import launch as scan
from fused.ops.selective_scan.launch import TILE
from fused.ops.shapes import DirectionWeights
from fused.runtime.library import below_autograd, none_if_empty, register, wants_gradients
from fused.runtime.modes import is_batch_invariant

Weights = Sequence[Tensor | None]  # a DirectionWeights as the operator takes it; empty for an absent direction


def mamba_inner(
    xz: Tensor, directions: Sequence[DirectionWeights], out_proj: Tensor, out_proj_bias: Tensor | None, *,
    keep_states: bool = False,
) -> Tensor:  # fmt: skip
    """Return out (B, L, D) of xz (B, L, 2E), in_proj's output. out_proj is (D, E), its bias (D,).

    A of the one or two directions is log(-A), and conv is (E, K) or (E, 1, K). The second direction runs from the last token.
    With `keep_states` the backward does not scan again: y, y before the gate and the state before every tile are kept. Matrix
    products are in xz's dtype, to which their weights are rounded.
    """
    first, second = list(directions[0]), list(directions[1]) if len(directions) > 1 else []
    keep = keep_states and wants_gradients(xz, first, second, out_proj, out_proj_bias)
    return _mamba_inner(xz, first, second, out_proj, out_proj_bias, is_batch_invariant(), keep)[0]


def _pipeline(xz: Tensor, first: Weights, second: Weights, batch_invariant: bool) -> Pipeline:
    x, z = xz.chunk(2, dim=-1)
    directions: Any = (first, second) if second else (first,)
    return Pipeline(x, z, directions, (False, True)[: len(directions)], batch_invariant, A_is_log=True)


def _forward(
    xz: Tensor, first: Weights, second: Weights, out_proj: Tensor, out_proj_bias: Tensor | None, batch_invariant: bool,
    keep: bool,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    p = _pipeline(xz, first, second, batch_invariant)
    training = keep or xz.requires_grad  # so that the backward's programs are compiled during the forward
    scan.start_compiling(*p.x.shape, p.N, len(p.reverses), xz.dtype, xz.device, has_z=True, training=training, kept=keep)
    packed = pack(*p.weights, dtype=xz.dtype)
    c, _ = p.convolve()
    dt_B_C, delta = p.project(c, packed)
    r = scan.forward(p.scan_inputs(c, dt_B_C, delta, packed), None, p.schedule, keep=keep)
    out_proj, out_proj_bias = out_proj.to(xz.dtype), None if out_proj_bias is None else out_proj_bias.to(xz.dtype)
    out = F.linear(r.y, out_proj, out_proj_bias)
    if keep:
        return out, dt_B_C, None, r.y, r.y_pre_gate, r.tile_states
    return out, dt_B_C, r.split_initial_states, None, None, None


def _forward_shapes(
    xz: Tensor, first: Weights, second: Weights, out_proj: Tensor, out_proj_bias: Tensor | None, batch_invariant: bool,
    keep: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    p = _pipeline(xz, first, second, batch_invariant)
    (B, L, E), d, splits, N = p.x.shape, len(p.reverses), p.schedule.fwd_schedule, p.N
    out, dt_B_C = xz.new_empty((B, L, out_proj.shape[0])), xz.new_empty((d, B, L, p.width))
    if keep:
        tile_states = xz.new_empty((d, B, -(-L // TILE), E, N), dtype=torch.float32)
        return out, dt_B_C, xz.new_empty(0), xz.new_empty((B, L, E)), xz.new_empty((B, L, E)), tile_states
    is_split = splits.num_unsplit < splits.num_sequences
    split_initial_states = xz.new_empty((d, B, splits.num_splits, E, N), dtype=torch.float32) if is_split else xz.new_empty(0)
    return out, dt_B_C, split_initial_states, xz.new_empty(0), xz.new_empty(0), xz.new_empty(0)


def _backward(
    xz: Tensor, first: Weights, second: Weights, out_proj: Tensor, out_proj_bias: Tensor | None, batch_invariant: bool,
    dt_B_C: Tensor, split_initial_states: Tensor | None, y: Tensor | None, y_pre_gate: Tensor | None,
    tile_states: Tensor | None, dout: Tensor,
) -> tuple[Any, ...]:  # fmt: skip
    p = _pipeline(xz, first, second, batch_invariant)
    y, pre_gate, states = none_if_empty(y), none_if_empty(y_pre_gate), none_if_empty(tile_states)
    kept = states is not None
    scan.start_compiling(*p.x.shape, p.N, len(p.reverses), xz.dtype, xz.device, has_z=True, training=True, kept=kept)
    packed = pack(*p.weights, dtype=xz.dtype)
    c, _ = p.convolve()
    s = p.scan_inputs(c, dt_B_C, p.delta(dt_B_C, packed), packed)
    rows = dout.flatten(0, 1)
    dy = (rows @ out_proj.to(xz.dtype)).view(p.x.shape)
    if y is None or states is None:
        entering = none_if_empty(split_initial_states)
        recomputed = scan.forward(s, None, p.schedule, keep=True, split_initial_states=entering)
        y, pre_gate, states = recomputed.y, recomputed.y_pre_gate, recomputed.tile_states
    assert states is not None
    dxz = torch.empty_like(xz, memory_format=torch.contiguous_format)
    dx, dz = dxz.chunk(2, dim=-1)
    _, _, grads = p.backward(s, c, dt_B_C, packed, dy, states, pre_gate, dx=dx, dz=dz)
    dfirst, dsecond = list(grads[0]), list(grads[1]) if second else []
    dout_proj = weight_gradient(rows, y.flatten(0, 1), out_proj.dtype).to(out_proj.dtype)
    dout_proj_bias = None if out_proj_bias is None else rows.sum(0, dtype=out_proj_bias.dtype)
    return dxz, dfirst, dsecond, dout_proj, dout_proj_bias


def _backward_shapes(
    xz: Tensor, first: Weights, second: Weights, out_proj: Tensor, out_proj_bias: Tensor | None, batch_invariant: bool,
    dt_B_C: Tensor, split_initial_states: Tensor | None, y: Tensor | None, y_pre_gate: Tensor | None,
    tile_states: Tensor | None, dout: Tensor,
) -> tuple[Any, ...]:  # fmt: skip
    def like(x: Tensor | None) -> Tensor:
        return xz.new_empty(0) if x is None else x.new_empty(x.shape)

    return like(xz), [like(x) for x in first], [like(x) for x in second], like(out_proj), like(out_proj_bias)


class _MambaInner(torch.autograd.Function):
    """Autograd of the operator. It saves its tensors, x_proj's output, and the split initial states or the kept states."""

    @classmethod
    def call(
        cls, xz: Tensor, first: Weights, second: Weights, out_proj: Tensor, out_proj_bias: Tensor | None, batch_invariant: bool,
        keep: bool,
    ) -> Any:  # fmt: skip
        """Apply to the tensors one by one, so that autograd sees each of them."""
        return cls.apply(batch_invariant, keep, len(first), xz, out_proj, out_proj_bias, *first, *second)

    @staticmethod
    def forward(
        ctx: Any, batch_invariant: bool, keep: bool, num_first: int, xz: Tensor, out_proj: Tensor, out_proj_bias: Tensor | None,
        *weights: Tensor | None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        ctx.batch_invariant, ctx.num_first = batch_invariant, num_first
        first, second = list(weights[:num_first]), list(weights[num_first:])
        operator = torch.ops.videomamba.mamba_inner.default
        out, *kept = below_autograd(operator, xz, first, second, out_proj, out_proj_bias, batch_invariant, keep)
        ctx.mark_non_differentiable(*(x for x in kept if x is not None))
        ctx.set_materialize_grads(False)
        ctx.num_kept = len(kept)
        ctx.save_for_backward(*kept, xz, out_proj, out_proj_bias, *weights)
        return out, *kept

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        if dout is None:
            return (None,) * len(ctx.needs_input_grad)
        saved = ctx.saved_tensors  # read once: activation checkpointing recomputes them at every access
        kept, (xz, out_proj, out_proj_bias, *weights) = saved[: ctx.num_kept], saved[ctx.num_kept :]
        first, second = weights[: ctx.num_first], weights[ctx.num_first :]
        dxz, dfirst, dsecond, dout_proj, dout_proj_bias = _mamba_inner_backward(
            xz, first, second, out_proj, out_proj_bias, ctx.batch_invariant, *kept, dout.contiguous()
        )  # fmt: skip
        inputs, grads = (xz, out_proj, out_proj_bias, *weights), (dxz, dout_proj, dout_proj_bias, *dfirst, *dsecond)
        return None, None, None, *(None if x is None else grad for x, grad in zip(inputs, grads, strict=True))


_INPUTS = "Tensor xz, Tensor?[] first, Tensor?[] second, Tensor out_proj, Tensor? out_proj_bias, bool batch_invariant"
_KEPT = "Tensor dt_B_C, Tensor split_initial_states, Tensor y, Tensor y_pre_gate, Tensor tile_states"
_KEPT_OR_NONE = _KEPT.replace("Tensor", "Tensor?")
_mamba_inner_backward = register(
    f"mamba_inner_backward({_INPUTS}, {_KEPT_OR_NONE}, Tensor dout) -> "
    "(Tensor dxz, Tensor[] dfirst, Tensor[] dsecond, Tensor dout_proj, Tensor dout_proj_bias)",  # empty for what is None
    _backward,
    _backward_shapes,
)
_mamba_inner = register(
    f"mamba_inner({_INPUTS}, bool keep) -> (Tensor out, {_KEPT})", _forward, _forward_shapes, _MambaInner.call
)
