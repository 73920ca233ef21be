"""One direction of a mixer over a chunk, from state to state, as one operator, `videomamba::mamba_inner_one_direction`.

    c = silu(conv(x))        dt, B, C = x_proj(c)        y = (scan + y_other_direction) * silu(z)

`y_other_direction` is the other direction's y over the same tokens, so a video in chunks needs no further pass to add the two.
All tensors that the backward reads are kept: it follows at once, or after a frame.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fused.ops.mamba_inner.kernels import PackedWeights, silu_gate_backward
from fused.ops.mamba_inner.pipeline import Pipeline, pack
from fused.ops.selective_scan import launch as scan
from fused.ops.selective_scan.inputs import aligned_or_none
from fused.ops.selective_scan.schedule import TILE
from fused.ops.shapes import DirectionWeights
from fused.runtime.library import none_if_empty, register, wants_gradients
from fused.runtime.modes import is_batch_invariant

Matrices = Sequence[Tensor]  # x_proj and dt_proj of PackedWeights, or empty


def mamba_inner_one_direction(
    x: Tensor, weights: DirectionWeights, *, reverse: bool, A_is_log: bool, z: Tensor | None = None,
    y_other_direction: Tensor | None = None, state: Sequence[Tensor] | None = None, packed: Matrices = (),
) -> tuple[Tensor, tuple[Tensor, Tensor]]:  # fmt: skip
    """Return y (B, L, E) of x (B, L, E), and the state that leaves: (B, E, K-1) in x's dtype, and (B, E, N) float32.

    z, the gate, and `y_other_direction`, which needs z, are (B, L, E). `state` enters, zero without it. `packed` is
    the result of `pack_matrices` for these weights, whose A and D then are float32.
    """
    conv_state, ssm_state = state or (None, None)
    ssm_state = None if ssm_state is None else ssm_state.float()
    inputs = (x, z, y_other_direction, conv_state, ssm_state, list(weights), list(packed))
    keep = wants_gradients(*inputs)
    y, conv_state, ssm_state, *_ = _one_direction(*inputs, reverse, A_is_log, is_batch_invariant(), keep)
    return y, (conv_state, ssm_state)


def pack_matrices(weights: DirectionWeights) -> tuple[Tensor, Tensor]:
    """Return x_proj (R + 2N padded, E) and dt_proj (R padded, E) as the operator packs them, once for many chunks."""
    packed = pack(*((x,) for x in weights), dtype=weights.x_proj.dtype)
    return packed.x_proj, packed.dt_proj


def _pipeline(
    x: Tensor, z: Tensor | None, weights: Sequence[Any], reverse: bool, A_is_log: bool, batch_invariant: bool
) -> Pipeline:
    return Pipeline(x, z, [weights], (reverse,), batch_invariant, A_is_log)


def _packed(p: Pipeline, packed: Matrices) -> PackedWeights:
    weights = p.weights
    if packed:
        return PackedWeights(packed[0], packed[1], weights.A, weights.D, (), packed[0], None)
    return pack(*weights, dtype=p.x.dtype)


def _forward(
    x: Tensor, z: Tensor | None, y_other_direction: Tensor | None, conv_state: Tensor | None, ssm_state: Tensor | None,
    weights: Sequence[Any], packed: Matrices, reverse: bool, A_is_log: bool, batch_invariant: bool, keep: bool,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    p = _pipeline(x, z, weights, reverse, A_is_log, batch_invariant)
    scan.start_compiling(*x.shape, p.N, 1, x.dtype, x.device, has_z=z is not None, training=keep, kept=keep)
    packed_weights = _packed(p, packed)
    c, conv_states = p.convolve((conv_state,), want_states=True)
    assert conv_states is not None
    dt_B_C, delta = p.project(c, packed_weights)
    s, y_other_direction = p.scan_inputs(c, dt_B_C, delta, packed_weights), aligned_or_none(y_other_direction)
    r = scan.forward(s, aligned_or_none(ssm_state), p.schedule, keep=keep, y_other_direction=y_other_direction)
    leaving = r.y, conv_states[0], r.final_states[0]
    if keep:
        return *leaving, c, dt_B_C, delta, None if z is None else r.y_pre_gate, r.tile_states
    return *leaving, *(None,) * 5


def _forward_shapes(
    x: Tensor, z: Tensor | None, y_other_direction: Tensor | None, conv_state: Tensor | None, ssm_state: Tensor | None,
    weights: Sequence[Any], packed: Matrices, reverse: bool, A_is_log: bool, batch_invariant: bool, keep: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    p = _pipeline(x, z, weights, reverse, A_is_log, batch_invariant)
    (B, L, E), K = x.shape, p.weights.conv[0].shape[1]
    leaving = x.new_empty((B, L, E)), x.new_empty((B, E, K - 1)), x.new_empty((B, E, p.N), dtype=torch.float32)
    if not keep:
        return *leaving, *(x.new_empty(0) for _ in range(5))
    c, dt_B_C, delta = x.new_empty((1, B, L, E)), x.new_empty((1, B, L, p.width)), x.new_empty((1, B, L, E))
    tile_states = x.new_empty((1, B, -(-L // TILE), E, p.N), dtype=torch.float32)
    return *leaving, c, dt_B_C, delta, x.new_empty(0 if z is None else (B, L, E)), tile_states


def _backward(
    x: Tensor, z: Tensor | None, y_other_direction: Tensor | None, conv_state: Tensor | None, ssm_state: Tensor | None,
    weights: Sequence[Any], packed: Matrices, reverse: bool, A_is_log: bool, batch_invariant: bool,
    c: Tensor, dt_B_C: Tensor, delta: Tensor, y_pre_gate: Tensor | None, tile_states: Tensor | None,
    dy: Tensor | None, dconv_state: Tensor | None, dssm_state: Tensor | None,
) -> tuple[Any, ...]:  # fmt: skip
    dy = torch.zeros_like(x) if dy is None else dy.contiguous()
    p = _pipeline(x, z, weights, reverse, A_is_log, batch_invariant)
    packed_weights = _packed(p, packed)
    s = p.scan_inputs(c, dt_B_C, delta, packed_weights)
    assert tile_states is not None  # it is empty without clips or tokens
    conv_grads, scan_grads, grads = p.backward(
        s, c, dt_B_C, packed_weights, dy, tile_states, none_if_empty(y_pre_gate),
        dfinal_states=aligned_or_none(dssm_state), conv_states=(conv_state,), dconv_states=(dconv_state,),
    )  # fmt: skip
    gated = y_other_direction is not None and s.z is not None
    return (
        conv_grads.x,
        None if z is None else scan_grads.z,
        silu_gate_backward(dy, s.z) if gated and s.z is not None else None,
        None if conv_state is None else conv_grads.initial_states[0],
        None if ssm_state is None else scan_grads.initial_states[0],
        list(grads[0]),
    )


def _backward_shapes(
    x: Tensor, z: Tensor | None, y_other_direction: Tensor | None, conv_state: Tensor | None, ssm_state: Tensor | None,
    weights: Sequence[Any], packed: Matrices, reverse: bool, A_is_log: bool, batch_invariant: bool,
    c: Tensor, dt_B_C: Tensor, delta: Tensor, y_pre_gate: Tensor | None, tile_states: Tensor | None,
    dy: Tensor | None, dconv_state: Tensor | None, dssm_state: Tensor | None,
) -> tuple[Any, ...]:  # fmt: skip
    def like(t: Tensor | None) -> Tensor:
        return x.new_empty(0) if t is None else t.new_empty(t.shape)

    return *(like(t) for t in (x, z, y_other_direction, conv_state, ssm_state)), [like(t) for t in weights]


_INPUTS = (
    "Tensor x, Tensor? z, Tensor? y_other_direction, Tensor? conv_state, Tensor? ssm_state, Tensor?[] weights, Tensor[] packed,"
    " bool reverse, bool A_is_log, bool batch_invariant"
)
_KEPT = "Tensor c, Tensor dt_B_C, Tensor delta, Tensor y_pre_gate, Tensor tile_states"
_KEPT_OR_NONE = _KEPT.replace("Tensor", "Tensor?")
_one_direction_backward = register(
    f"mamba_inner_one_direction_backward({_INPUTS}, {_KEPT_OR_NONE}, Tensor? dy, Tensor? dconv_state, Tensor? dssm_state) -> "
    "(Tensor dx, Tensor dz, Tensor dy_other_direction, Tensor dconv_state_in, Tensor dssm_state_in, Tensor[] dweights)",
    _backward,
    _backward_shapes,
)
_one_direction = register(
    f"mamba_inner_one_direction({_INPUTS}, bool keep) -> (Tensor y, Tensor conv_state_out, Tensor ssm_state_out, {_KEPT})",
    _forward,
    _forward_shapes,
    _one_direction_backward,
)
