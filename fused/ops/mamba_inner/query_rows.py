"""A mixer whose output is wanted at some tokens only, the query rows, as one operator, `videomamba::mamba_inner_query_rows`.

    x = in_proj_x(u)        z = in_proj_z(u at query rows)        c = silu(conv(x))        dt, B, C = x_proj(c)
    y = sum of both scans at query rows * silu(z)                 out = out_proj(y)

Kernels are those of `mamba_inner`. The scan computes its states and C h + D u at every token, since a branch at each token
costs more than the sum over states, and reads z and writes y at query rows only. The gate's half of in_proj, and out_proj, are
products of query rows. C is computed for every token: its N columns of x_proj cost less than a copy of c at query rows.

Inference over many tokens goes through dt_proj and the scan in blocks of channels, so that only a block's delta is in memory,
and drops x after the convolution.

For training the forward keeps y, y before the gate and the state before every tile: the peak of memory is in the backward,
which needs them at once. The backward recomputes c and delta.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fused.ops.mamba_inner.kernels import PackedWeights, dt_proj_softplus
from fused.ops.mamba_inner.native import linear_gradients
from fused.ops.mamba_inner.pipeline import Pipeline, pack, pack_mixer, weight_gradient
from fused.ops.selective_scan import launch as scan
from fused.ops.selective_scan.inputs import ScanInputs, aligned_or_none
from fused.ops.selective_scan.schedule import TILE
from fused.ops.shapes import DirectionWeights, Linear, Weights
from fused.runtime import plans
from fused.runtime.library import none_if_empty, register, wants_gradients
from fused.runtime.modes import is_batch_invariant

BLOCK_ELEMENTS = 2**29  # of delta, both directions, that an inference has in memory
CHANNELS_OF_BLOCKS = 64  # blocks of channels are multiples of this, so that the kernels' own blocks are full


def mamba_inner_query_rows(
    u: Tensor, u_queries: Tensor, tile_queries: Tensor, in_proj: Linear, directions: Sequence[DirectionWeights],
    out_proj: Linear, *, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Return out (B, Q, D) in `dtype` at the query rows of u (B, L, D), of which u_queries (B, Q, D) is a copy.

    `tile_queries` is `selective_scan.query_rows.tile_queries` of their places. The other arguments are those of `mamba_inner`,
    which gives the same at these rows.
    """
    first, second = list(directions[0]), list(directions[1]) if len(directions) > 1 else []
    training = wants_gradients(u, u_queries, first, second, in_proj, out_proj)
    options = dtype, is_batch_invariant(), training
    arguments = u, u_queries, first, second, *in_proj, *out_proj, tile_queries, *options
    elements = len(directions) * u.shape[0] * u.shape[1] * out_proj.weight.shape[1]
    if training or torch.compiler.is_compiling() or elements <= BLOCK_ELEMENTS:
        return _query_rows(*arguments)[0]
    with plans.enabled(False):  # a plan holds the results of PyTorch's operations, x here, to its end
        return _query_rows(*arguments)[0]


def one_direction_at_queries(
    x: Tensor, weights: DirectionWeights, tile_queries: Tensor, num_queries: int, *, reverse: bool,
    state: Sequence[Tensor] | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:  # fmt: skip
    """Return y (B, Q, E) of one direction of x (B, L, E) at the query rows, without a gate, and the state that leaves.

    The weights and the state are those of `mamba_inner_one_direction`, with A_is_log. Nothing here has gradients or is traced.
    """
    conv_state, ssm_state = state or (None, None)
    p = Pipeline(x, None, [weights], (reverse,), is_batch_invariant(), A_is_log=True)
    packed = pack(*p.weights, dtype=x.dtype)
    c, conv_states = p.convolve((conv_state,), want_states=True)
    assert conv_states is not None
    dt_B_C, delta = p.project(c, packed)
    s = p.scan_inputs(c, dt_B_C, delta, packed)._replace(tile_queries=tile_queries, num_queries=num_queries)
    r = scan.forward(s, aligned_or_none(ssm_state), p.schedule, keep=False)
    return r.y, (conv_states[0], r.final_states[0])


def _scan_inputs(p: Pipeline, c: Tensor, dt_B_C: Tensor, delta: Tensor, packed: PackedWeights, table: Tensor) -> ScanInputs:
    assert p.z is not None
    return p.scan_inputs(c, dt_B_C, delta, packed)._replace(tile_queries=table, num_queries=p.z.shape[1])


def _halves(bias: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, ...] | tuple[None, None]:
    """Return the halves of in_proj's bias (2E,) for x and z, in `dtype`; None for None."""
    return (None, None) if bias is None else bias.to(dtype).chunk(2)


def _forward(
    u: Tensor, u_queries: Tensor, first: Weights, second: Weights, in_proj: Tensor, in_proj_bias: Tensor | None,
    out_proj: Tensor, out_proj_bias: Tensor | None, tile_queries: Tensor, dtype: torch.dtype, batch_invariant: bool,
    training: bool,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Return out (B, Q, D), and with `training` what the backward reads, in the order of _KEPT."""
    packed = pack_mixer(first, second, in_proj, out_proj, dtype)
    (weight_x, weight_z), out_proj_cast = packed.linears[0].chunk(2), packed.linears[1]
    bias_x, bias_z = _halves(in_proj_bias, dtype)
    x, z = F.linear(u.to(dtype), weight_x, bias_x), F.linear(u_queries.to(dtype), weight_z, bias_z)
    p = Pipeline.of_mixer(x, z, first, second, batch_invariant)
    c, _ = p.convolve()
    bias = None if out_proj_bias is None else out_proj_bias.to(dtype)
    if not training:
        p.x = c[0]  # of x's shape; x is not read any more
        del x
        y = _scan_in_blocks(p, c, packed, tile_queries, _channel_blocks(c, batch_invariant))
        return F.linear(y, out_proj_cast, bias), *(None,) * 8
    dt_B_C, delta = p.project(c, packed)
    r = scan.forward(_scan_inputs(p, c, dt_B_C, delta, packed, tile_queries), None, p.schedule, keep=True)
    kept = x, z, packed.packed, packed.A_D, dt_B_C, r.y, r.y_pre_gate, r.tile_states
    return F.linear(r.y, out_proj_cast, bias), *kept


def _channel_blocks(c: Tensor, batch_invariant: bool) -> int:
    """Return in how many blocks of channels c (directions, B, L, E) is scanned: a power of 2, and blocks fit the kernels."""
    elements, blocks = c[:, 0].numel() if batch_invariant else c.numel(), 1
    while elements > blocks * BLOCK_ELEMENTS and c.shape[3] % (2 * blocks * CHANNELS_OF_BLOCKS) == 0:
        blocks *= 2
    return blocks


def _scan_in_blocks(p: Pipeline, c: Tensor, packed: PackedWeights, table: Tensor, blocks: int) -> Tensor:
    """Return y (B, Q, E) of c (directions, B, L, E), with delta of one block of channels at a time."""
    dt_B_C, width, ys = p.project_x(c, packed), c.shape[3] // blocks, []
    s = _scan_inputs(p, c, dt_B_C, c, packed, table)  # c stands for delta
    assert s.z is not None
    for first in range(0, c.shape[3], width):
        own = slice(first, first + width)
        dt_proj = packed.dt_proj if blocks == 1 else packed.dt_proj[..., own].contiguous()
        delta = dt_proj_softplus(dt_B_C.flatten(1, 2), dt_proj, [bias[own] for bias in p.weights.dt_bias])
        u, A, D = [x[..., own] for x in s.u], [x[own] for x in s.A], [None if x is None else x[own] for x in s.D]
        part = s._replace(u=u, delta=delta.view(len(c), *u[0].shape).unbind(), A=A, D=D, z=s.z[..., own])
        plan = p.schedule if blocks == 1 else scan.schedule_for(u[0], p.N, len(c), p.batch_invariant)
        ys.append(scan.forward(part, None, plan, keep=False, only_y=True).y)
        del delta, part
    return ys[0] if blocks == 1 else torch.cat(ys, dim=-1)


def _forward_shapes(
    u: Tensor, u_queries: Tensor, first: Weights, second: Weights, in_proj: Tensor, in_proj_bias: Tensor | None,
    out_proj: Tensor, out_proj_bias: Tensor | None, tile_queries: Tensor, dtype: torch.dtype, batch_invariant: bool,
    training: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    (B, L, _), Q, E = u.shape, u_queries.shape[1], out_proj.shape[1]
    out = u.new_empty((B, Q, out_proj.shape[0]), dtype=dtype)
    if not training:
        return out, *(u.new_empty(0) for _ in range(8))
    x, z = out.new_empty((B, L, E)), out.new_empty((B, Q, E))
    p = Pipeline.of_mixer(x, z, first, second, batch_invariant)
    d, N = len(p.reverses), p.N
    packed, A_D = p.packed_shapes((in_proj, out_proj), dtype)
    tile_states = out.new_empty((d, B, -(-L // TILE), E, N), dtype=torch.float32)
    y, y_pre_gate = out.new_empty(z.shape), out.new_empty(z.shape)
    return out, x, z, packed, A_D, out.new_empty((d, B, L, p.width)), y, y_pre_gate, tile_states


def _backward(
    u: Tensor, u_queries: Tensor, first: Weights, second: Weights, in_proj: Tensor, in_proj_bias: Tensor | None,
    out_proj: Tensor, out_proj_bias: Tensor | None, tile_queries: Tensor, dtype: torch.dtype, batch_invariant: bool,
    x: Tensor, z: Tensor, packed_matrices: Tensor, A_D: Tensor | None, dt_B_C: Tensor, y: Tensor, y_pre_gate: Tensor,
    tile_states: Tensor, dout: Tensor,
) -> tuple[Any, ...]:  # fmt: skip
    """Return the gradients of u, u_queries, both directions' weights, in_proj and out_proj; None for None."""
    packed = pack_mixer(first, second, in_proj, out_proj, dtype, packed_matrices, none_if_empty(A_D))
    (weight_x, weight_z), out_proj_cast = packed.linears[0].chunk(2), packed.linears[1]
    p = Pipeline.of_mixer(x, z, first, second, batch_invariant)
    c, _ = p.convolve()
    s = _scan_inputs(p, c, dt_B_C, p.delta(dt_B_C, packed), packed, tile_queries)
    rows = dout.contiguous().flatten(0, 1)
    dy = (rows @ out_proj_cast).view(z.shape)
    dx, dz = torch.empty_like(x), torch.empty_like(z)
    _, _, grads = p.backward(s, c, dt_B_C, packed, dy, tile_states, y_pre_gate, dx=dx, dz=dz)
    d_out_proj, d_out_bias = linear_gradients(rows, y.flatten(0, 1), out_proj, out_proj_bias)
    pairs = ((dx, u, weight_x), (dz, u_queries, weight_z))
    d_in_proj = torch.cat([weight_gradient(g.flatten(0, 1), t.to(dtype).flatten(0, 1), in_proj.dtype) for g, t, _ in pairs])
    d_in_bias = None
    if in_proj_bias is not None:
        d_in_bias = torch.cat([g.sum((0, 1), dtype=in_proj_bias.dtype) for g in (dx, dz)])
    du, du_queries = ((g.flatten(0, 1) @ w).view(t.shape).to(t.dtype) for g, t, w in pairs)
    grads_second = list(grads[1]) if second else []
    return du, du_queries, list(grads[0]), grads_second, d_in_proj.to(in_proj.dtype), d_in_bias, d_out_proj, d_out_bias


def _backward_shapes(
    u: Tensor, u_queries: Tensor, first: Weights, second: Weights, in_proj: Tensor, in_proj_bias: Tensor | None,
    out_proj: Tensor, out_proj_bias: Tensor | None, tile_queries: Tensor, dtype: torch.dtype, batch_invariant: bool,
    x: Tensor, z: Tensor, packed_matrices: Tensor, A_D: Tensor | None, dt_B_C: Tensor, y: Tensor, y_pre_gate: Tensor,
    tile_states: Tensor, dout: Tensor,
) -> tuple[Any, ...]:  # fmt: skip
    def like(t: Tensor | None) -> Tensor:
        return u.new_empty(0) if t is None else t.new_empty(t.shape)

    linear = (in_proj, in_proj_bias, out_proj, out_proj_bias)
    return like(u), like(u_queries), [like(t) for t in first], [like(t) for t in second], *(like(t) for t in linear)


_INPUTS = (
    "Tensor u, Tensor u_queries, Tensor?[] first, Tensor?[] second, Tensor in_proj, Tensor? in_proj_bias, Tensor out_proj, "
    "Tensor? out_proj_bias, Tensor tile_queries, ScalarType dtype, bool batch_invariant"
)
_KEPT = "Tensor x, Tensor z, Tensor packed, Tensor A_D, Tensor dt_B_C, Tensor y, Tensor y_pre_gate, Tensor tile_states"
_KEPT_OR_NONE = _KEPT.replace("Tensor A_D", "Tensor? A_D")
_query_rows_backward = register(
    f"mamba_inner_query_rows_backward({_INPUTS}, {_KEPT_OR_NONE}, Tensor dout) -> "
    "(Tensor du, Tensor du_queries, Tensor[] dfirst, Tensor[] dsecond, Tensor d_in_proj, Tensor d_in_proj_bias, "
    "Tensor d_out_proj, Tensor d_out_proj_bias)",
    _backward,
    _backward_shapes,
)
_query_rows = register(
    f"mamba_inner_query_rows({_INPUTS}, bool training) -> (Tensor out, {_KEPT})",
    _forward,
    _forward_shapes,
    _query_rows_backward,
)
