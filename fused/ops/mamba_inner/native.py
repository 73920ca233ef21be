"""A mixer as one operator, `videomamba::mamba_inner`.

    xz = in_proj(u)        c = silu(conv(x))        dt, B, C = x_proj(c)
    y = sum of both scans * silu(z)                 out = out_proj(y)

The forward keeps xz, x_proj's output and the packed weights. The backward recomputes everything else, and the scan unless its
states are kept. Both directions share one launch of the convolution, of x_proj, of dt_proj and of the scan, B and C are read
where x_proj wrote them, and the gradients of x and z are written straight into the gradient of xz.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fused.ops.mamba_inner.pipeline import Pipeline, pack_mixer, weight_gradient
from fused.ops.selective_scan import launch as scan
from fused.ops.selective_scan.schedule import TILE
from fused.ops.shapes import DirectionWeights, Linear, Weights
from fused.runtime.library import none_if_empty, register, wants_gradients
from fused.runtime.modes import is_batch_invariant


def mamba_inner(
    u: Tensor, in_proj: Linear | None, directions: Sequence[DirectionWeights], out_proj: Linear, *, dtype: torch.dtype,
    keep_states: bool = False,
) -> Tensor:  # fmt: skip
    """Return out (B, L, D) in `dtype` of u (B, L, D); without `in_proj` u is its output, xz (B, L, 2E).

    in_proj's weight is (2E, D), out_proj's (D, E). A of the one or two directions is log(-A), and conv is (E, K) or (E, 1, K).
    The second direction runs from the last token. Matrix products are in `dtype`, to which u and weights are rounded. With
    `keep_states` the backward does not scan again: y, y before the gate and the state before every tile are kept.
    """
    first, second = list(directions[0]), list(directions[1]) if len(directions) > 1 else []
    linear = (*(in_proj or (None, None)), *out_proj)
    keep = keep_states and wants_gradients(u, first, second, linear)
    keep_splits = not torch.compiler.is_compiling()  # to a compiler that does not know the batch, their number has no value
    only_y = not torch.is_grad_enabled()  # states need not be more exact than y
    return _mamba_inner(u, first, second, *linear, dtype, is_batch_invariant(), keep_splits, keep, only_y)[0]


def _forward(
    u: Tensor, first: Weights, second: Weights, in_proj: Tensor | None, in_proj_bias: Tensor | None, out_proj: Tensor,
    out_proj_bias: Tensor | None, dtype: torch.dtype, batch_invariant: bool, keep_splits: bool, keep: bool,
    only_y: bool,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Return out (B, L, D) and what the backward reads, in the order of _KEPT; None for what is not kept."""
    packed, xz = pack_mixer(first, second, in_proj, out_proj, dtype), u.to(dtype)
    *in_proj_cast, out_proj_cast = packed.linears
    if in_proj_cast:
        xz = F.linear(xz, in_proj_cast[0], None if in_proj_bias is None else in_proj_bias.to(dtype))
    x, z = xz.chunk(2, dim=-1)
    p = Pipeline.of_mixer(x, z, first, second, batch_invariant)
    training = keep or u.requires_grad  # so that the backward's programs are compiled during the forward
    scan.start_compiling(*p.x.shape, p.N, len(p.reverses), dtype, xz.device, has_z=True, training=training, kept=keep)
    c, _ = p.convolve()
    dt_B_C, delta = p.project(c, packed)
    r = scan.forward(p.scan_inputs(c, dt_B_C, delta, packed), None, p.schedule, keep=keep, only_y=only_y)
    out = F.linear(r.y, out_proj_cast, None if out_proj_bias is None else out_proj_bias.to(dtype))
    always = None if in_proj is None else xz, packed.packed, packed.A_D, dt_B_C
    if keep:
        return out, *always, None, r.y, r.y_pre_gate, r.tile_states
    return out, *always, r.split_initial_states if keep_splits and not only_y else None, None, None, None


def _forward_shapes(
    u: Tensor, first: Weights, second: Weights, in_proj: Tensor | None, in_proj_bias: Tensor | None, out_proj: Tensor,
    out_proj_bias: Tensor | None, dtype: torch.dtype, batch_invariant: bool, keep_splits: bool, keep: bool,
    only_y: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    B, L, _ = u.shape
    xz = u.new_empty(u.shape if in_proj is None else (B, L, in_proj.shape[0]), dtype=dtype)
    x, z = xz.chunk(2, dim=-1)
    p = Pipeline.of_mixer(x, z, first, second, batch_invariant)
    E, d, N, empty = p.x.shape[2], len(p.reverses), p.N, xz.new_empty(0)
    packed, A_D = p.packed_shapes((in_proj, out_proj), dtype)
    out, dt_B_C = xz.new_empty((B, L, out_proj.shape[0])), xz.new_empty((d, B, L, p.width))
    always = xz.new_empty(0) if in_proj is None else xz, packed, A_D, dt_B_C
    if keep:
        tile_states = xz.new_empty((d, B, -(-L // TILE), E, N), dtype=torch.float32)
        return out, *always, empty, xz.new_empty((B, L, E)), xz.new_empty((B, L, E)), tile_states
    splits = p.schedule.fwd_schedule if keep_splits and not only_y else None
    if splits is not None and splits.num_unsplit < splits.num_sequences:
        empty = xz.new_empty((d, B, splits.num_splits, E, N), dtype=torch.float32)
    return out, *always, empty, *(xz.new_empty(0) for _ in range(3))


def _backward(
    u: Tensor, first: Weights, second: Weights, in_proj: Tensor | None, in_proj_bias: Tensor | None, out_proj: Tensor,
    out_proj_bias: Tensor | None, dtype: torch.dtype, batch_invariant: bool,
    xz: Tensor | None, packed_matrices: Tensor, A_D: Tensor | None, dt_B_C: Tensor, split_initial_states: Tensor | None,
    y: Tensor | None, y_pre_gate: Tensor | None, tile_states: Tensor | None, dout: Tensor,
) -> tuple[Any, ...]:  # fmt: skip
    """Return the gradients of u, of both directions' weights, of in_proj and of out_proj, None for None."""
    tokens = u.to(dtype)
    x, z = (tokens if in_proj is None or xz is None else xz).chunk(2, dim=-1)
    p = Pipeline.of_mixer(x, z, first, second, batch_invariant)
    y, pre_gate, states = none_if_empty(y), none_if_empty(y_pre_gate), none_if_empty(tile_states)
    kept = states is not None
    scan.start_compiling(*p.x.shape, p.N, len(p.reverses), dtype, u.device, has_z=True, training=True, kept=kept)
    packed = pack_mixer(first, second, in_proj, out_proj, dtype, packed_matrices, none_if_empty(A_D))
    *in_proj_cast, out_proj_cast = packed.linears
    c, _ = p.convolve()
    s = p.scan_inputs(c, dt_B_C, p.delta(dt_B_C, packed), packed)
    rows = dout.contiguous().flatten(0, 1)
    dy = (rows @ out_proj_cast).view(p.x.shape)
    if y is None or states is None:
        entering = none_if_empty(split_initial_states)
        recomputed = scan.forward(s, None, p.schedule, keep=True, split_initial_states=entering)
        y, pre_gate, states = recomputed.y, recomputed.y_pre_gate, recomputed.tile_states
    assert states is not None
    B, L, E = p.x.shape
    dxz = torch.empty((B, L, 2 * E), dtype=dtype, device=u.device)
    dx, dz = dxz.chunk(2, dim=-1)
    _, _, grads = p.backward(s, c, dt_B_C, packed, dy, states, pre_gate, dx=dx, dz=dz)
    d_out_proj, d_out_proj_bias = linear_gradients(rows, y.flatten(0, 1), out_proj, out_proj_bias)
    du, d_in_proj, d_in_proj_bias = dxz, None, None
    if in_proj is not None:
        d_in_proj, d_in_proj_bias = linear_gradients(dxz.flatten(0, 1), tokens.flatten(0, 1), in_proj, in_proj_bias)
        du = (dxz.flatten(0, 1) @ in_proj_cast[0]).view(u.shape)
    grads_second = list(grads[1]) if second else []
    return du.to(u.dtype), list(grads[0]), grads_second, d_in_proj, d_in_proj_bias, d_out_proj, d_out_proj_bias


def linear_gradients(dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return the gradients of a linear layer's weight and bias, of dout (tokens, out) and its input x (tokens, in)."""
    return weight_gradient(dout, x, weight.dtype).to(weight.dtype), None if bias is None else dout.sum(0, dtype=bias.dtype)


def _backward_shapes(
    u: Tensor, first: Weights, second: Weights, in_proj: Tensor | None, in_proj_bias: Tensor | None, out_proj: Tensor,
    out_proj_bias: Tensor | None, dtype: torch.dtype, batch_invariant: bool,
    xz: Tensor | None, packed_matrices: Tensor, A_D: Tensor | None, dt_B_C: Tensor, split_initial_states: Tensor | None,
    y: Tensor | None, y_pre_gate: Tensor | None, tile_states: Tensor | None, dout: Tensor,
) -> tuple[Any, ...]:  # fmt: skip
    def like(x: Tensor | None) -> Tensor:
        return u.new_empty(0) if x is None else x.new_empty(x.shape)

    linear = (in_proj, in_proj_bias, out_proj, out_proj_bias)
    return like(u), [like(x) for x in first], [like(x) for x in second], *(like(x) for x in linear)


_INPUTS = (
    "Tensor u, Tensor?[] first, Tensor?[] second, Tensor? in_proj, Tensor? in_proj_bias, Tensor out_proj, "
    "Tensor? out_proj_bias, ScalarType dtype, bool batch_invariant"
)
_KEPT = (
    "Tensor xz, Tensor packed, Tensor A_D, Tensor dt_B_C, Tensor split_initial_states, Tensor y, Tensor y_pre_gate, "
    "Tensor tile_states"
)
_KEPT_OR_NONE = _KEPT.replace("Tensor", "Tensor?")
_mamba_inner_backward = register(
    f"mamba_inner_backward({_INPUTS}, {_KEPT_OR_NONE}, Tensor dout) -> "
    "(Tensor du, Tensor[] dfirst, Tensor[] dsecond, Tensor d_in_proj, Tensor d_in_proj_bias, Tensor d_out_proj, "
    "Tensor d_out_proj_bias)",
    _backward,
    _backward_shapes,
)
_mamba_inner = register(
    f"mamba_inner({_INPUTS}, bool keep_splits, bool keep, bool only_y) -> (Tensor out, {_KEPT})",
    _forward,
    _forward_shapes,
    _mamba_inner_backward,
)
