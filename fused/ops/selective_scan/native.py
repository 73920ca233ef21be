"""The selective scan by kernels of this project, as the operator `videomamba::selective_scan` over one or two directions."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fused.ops.selective_scan import launch
from fused.ops.selective_scan.inputs import ScanInputs, aligned_or_none
from fused.ops.selective_scan.launch import schedule_for
from fused.ops.selective_scan.schedule import TILE
from fused.ops.shapes import dense
from fused.runtime.autocast import no_autocast
from fused.runtime.library import none_if_empty, register, wants_gradients
from fused.runtime.modes import is_batch_invariant

Pair = Sequence[Tensor]
OptionalPair = Sequence[Tensor | None]


def selective_scan_native(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None, delta_bias: Tensor | None,
    *, softplus: bool, initial_state: Tensor | None, reverse: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Scan as `fused.selective_scan` says; every group of channels is a separate scan.

    Raises ValueError for more than 64 states.
    """
    _check_states("selective_scan", A)
    groups = max(x.shape[2] if x.dim() == 4 else 1 for x in (B, C))
    if groups > 1:
        width, ys, states = u.shape[2] // groups, [], []
        for g in range(groups):
            e = slice(g * width, (g + 1) * width)
            group_B, group_C = (x if x.dim() == 3 else x[:, :, g] for x in (B, C))
            group_D, bias = (None if x is None else x[e] for x in (D, delta_bias))
            group_z, state = None if z is None else z[..., e], None if initial_state is None else initial_state[:, e]
            y, state = selective_scan_native(
                u[..., e], delta[..., e], A[e], group_B, group_C, group_D, group_z, bias,
                softplus=softplus, initial_state=state, reverse=reverse,
            )  # fmt: skip
            ys.append(y)
            states.append(state)
        with no_autocast(u.device):
            return torch.cat(ys, 2), torch.cat(states, 1)
    B, C = (x.flatten(2) if x.dim() == 4 else x for x in (B, C))
    y, final_states = _scan((u,), (delta,), (A,), (B,), (C,), (D,), (delta_bias,), z, initial_state, softplus, (reverse,))
    return y, final_states[0]


def bidirectional_scan_native(
    u: Pair, delta: Pair, A: Pair, B: Pair, C: Pair, D: OptionalPair, z: Tensor | None, delta_bias: OptionalPair, *,
    softplus: bool,
) -> Tensor:  # fmt: skip
    """Scan as `fused.bidirectional_scan` says, in one kernel; B and C without groups.

    Raises ValueError for more than 64 states.
    """
    _check_states("bidirectional_scan", A[0])
    return _scan(u, delta, A, B, C, D, delta_bias, z, None, softplus, (False, True))[0]


def _check_states(name: str, A: Tensor) -> None:
    if A.shape[1] > launch.MAX_STATES:
        raise ValueError(f"{name}: backend 'native' has N up to {launch.MAX_STATES}, got N={A.shape[1]}")


def _scan(
    u: Pair, delta: Pair, A: Pair, B: Pair, C: Pair, D: OptionalPair, delta_bias: OptionalPair, z: Tensor | None,
    initial_state: Tensor | None, softplus: bool, reverses: tuple[bool, ...],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Call the operator with tokens in one dtype and the rest in float32; return y (B, L, E) in u's dtype and
    final states (directions, B, E, N)."""
    dtype = u[0].dtype
    tokens = [x for x in (*u, *delta, *B, *C, z) if x is not None]
    if any(x.dtype != dtype for x in tokens):  # float32 holds them all
        u, delta, B, C = ([x.float() for x in pair] for pair in (u, delta, B, C))
        z = None if z is None else z.float()
    A = [x.float() for x in A]
    D, delta_bias = ([None if x is None else x.float() for x in pair] for pair in (D, delta_bias))
    initial_state = None if initial_state is None else initial_state.float()
    inputs = (list(u), list(delta), A, list(B), list(C), D, delta_bias, z, initial_state)
    keep = wants_gradients(*inputs)
    y, final_states, _, _ = _selective_scan(*inputs, softplus, list(reverses), is_batch_invariant(), keep)
    return y.to(dtype), final_states


def _scan_inputs(
    u: Pair, delta: Pair, A: Pair, B: Pair, C: Pair, D: OptionalPair, delta_bias: OptionalPair, z: Tensor | None,
    softplus: bool, reverses: Sequence[bool],
) -> ScanInputs:  # fmt: skip
    """Return the inputs with the strides and alignment that the kernels read; the two of a pair get the same strides."""

    def same_strides(pair: Pair) -> Pair:
        pair = [dense(x) for x in pair]
        return pair if all(x.stride() == pair[0].stride() for x in pair) else [x.contiguous() for x in pair]

    def aligned(pair: OptionalPair) -> Any:
        return [aligned_or_none(x) for x in pair]

    return ScanInputs(
        tuple(reverses), same_strides(u), same_strides(delta), aligned(A), same_strides(B), same_strides(C), aligned(D),
        aligned(delta_bias),
        None if z is None else dense(z), softplus,
    )  # fmt: skip


def _forward(
    u: Pair, delta: Pair, A: Pair, B: Pair, C: Pair, D: OptionalPair, delta_bias: OptionalPair, z: Tensor | None,
    initial_state: Tensor | None, softplus: bool, reverses: Sequence[bool], batch_invariant: bool, keep: bool,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Return y (B, L, E), final states (d, B, E, N), and if `keep` y before the gate and tile states (d, B, tiles, E, N)."""
    s = _scan_inputs(u, delta, A, B, C, D, delta_bias, z, softplus, reverses)
    plan = schedule_for(s.u[0], A[0].shape[1], len(s.reverses), batch_invariant)
    r = launch.forward(s, aligned_or_none(initial_state), plan, keep=keep)
    return r.y, r.final_states, r.y_pre_gate if keep and z is not None else None, r.tile_states


def _forward_shapes(
    u: Pair, delta: Pair, A: Pair, B: Pair, C: Pair, D: OptionalPair, delta_bias: OptionalPair, z: Tensor | None,
    initial_state: Tensor | None, softplus: bool, reverses: Sequence[bool], batch_invariant: bool, keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    (clips, L, E), N, d = u[0].shape, A[0].shape[1], len(reverses)
    y_pre_gate = u[0].new_empty((clips, L, E) if keep and z is not None else 0)
    tile_states = A[0].new_empty((d, clips, -(-L // TILE), E, N) if keep else 0)
    return u[0].new_empty((clips, L, E)), A[0].new_empty((d, clips, E, N)), y_pre_gate, tile_states


def _backward(
    u: Pair, delta: Pair, A: Pair, B: Pair, C: Pair, D: OptionalPair, delta_bias: OptionalPair, z: Tensor | None,
    initial_state: Tensor | None, softplus: bool, reverses: Sequence[bool], batch_invariant: bool,
    y_pre_gate: Tensor | None, tile_states: Tensor | None, dy: Tensor | None, dfinal_states: Tensor | None,
) -> tuple[Any, ...]:  # fmt: skip
    """Return the gradients of all tensors, in their shapes and order; None for None."""
    dy = torch.zeros_like(u[0]) if dy is None else dy
    s = _scan_inputs(u, delta, A, B, C, D, delta_bias, z, softplus, reverses)
    plan = schedule_for(s.u[0], A[0].shape[1], len(s.reverses), batch_invariant)
    dB, dC = ([torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in pair] for pair in (s.B, s.C))
    states = none_if_empty(tile_states)
    if states is None:  # only without a batch, tokens or channels are there none to keep
        assert not dy.numel()
        states = dy.new_empty(0)
    g = launch.backward(s, dense(dy), aligned_or_none(dfinal_states), states, none_if_empty(y_pre_gate), plan, dB, dC)
    pairs = (D, g.D), (delta_bias, g.delta_bias)
    dD, dbias = ([None if x is None else grad for x, grad in zip(*pair, strict=True)] for pair in pairs)
    dinitial = None if initial_state is None else g.initial_states.reshape(initial_state.shape)
    return list(g.u), list(g.delta), list(g.A), dB, dC, dD, dbias, g.z, dinitial


def _backward_shapes(
    u: Pair, delta: Pair, A: Pair, B: Pair, C: Pair, D: OptionalPair, delta_bias: OptionalPair, z: Tensor | None,
    initial_state: Tensor | None, softplus: bool, reverses: Sequence[bool], batch_invariant: bool,
    y_pre_gate: Tensor | None, tile_states: Tensor | None, dy: Tensor | None, dfinal_states: Tensor | None,
) -> tuple[Any, ...]:  # fmt: skip
    def like(x: Tensor | None) -> Tensor:
        return u[0].new_empty(0) if x is None else x.new_empty(x.shape)

    pairs = (u, delta, A, B, C, D, delta_bias)
    return *([like(x) for x in pair] for pair in pairs), like(z), like(initial_state)


_INPUTS = (
    "Tensor[] u, Tensor[] delta, Tensor[] A, Tensor[] B, Tensor[] C, Tensor?[] D, Tensor?[] delta_bias, Tensor? z, "
    "Tensor? initial_state, bool softplus, bool[] reverses, bool batch_invariant"
)
_selective_scan_backward = register(
    f"selective_scan_backward({_INPUTS}, Tensor? y_pre_gate, Tensor? tile_states, Tensor? dy, Tensor? dfinal_states) -> "
    "(Tensor[] du, Tensor[] ddelta, Tensor[] dA, Tensor[] dB, Tensor[] dC, Tensor[] dD, Tensor[] ddelta_bias, Tensor dz, "
    "Tensor dinitial_state)",  # empty for what is None
    _backward,
    _backward_shapes,
)
_selective_scan = register(
    f"selective_scan({_INPUTS}, bool keep) -> (Tensor y, Tensor final_states, Tensor y_pre_gate, Tensor tile_states)",
    _forward,
    _forward_shapes,
    _selective_scan_backward,
)
