"""The selective scan by the kernels for CPUs, as the operator `videomamba::selective_scan_cpu` over one or two directions."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fused.ops.selective_scan.eager import selective_scan_eager
from fused.ops.shapes import dense
from fused.runtime import cpu_library
from fused.runtime.autocast import no_autocast
from fused.runtime.dtypes import accumulation_dtype
from fused.runtime.exporting import is_exporting
from fused.runtime.library import none_if_empty, register, wants_gradients

Pair = Sequence[Tensor]
OptionalPair = Sequence[Tensor | None]
Size = int | torch.SymInt
CHUNK, PART = 32, 6  # as in cpu.cpp


def selective_scan_cpu(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None, delta_bias: Tensor | None,
    *, softplus: bool, initial_state: Tensor | None, reverse: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Scan as `fused.selective_scan` says, on a CPU."""
    if is_exporting():
        options: dict[str, Any] = {"softplus": softplus, "initial_state": initial_state, "reverse": reverse}
        return selective_scan_eager(u, delta, A, B, C, D, z, delta_bias, **options)
    y, final = _scan((u,), (delta,), (A,), (B,), (C,), (D,), (delta_bias,), z, initial_state, softplus, (reverse,))
    return y, final[0]


def bidirectional_scan_cpu(
    u: Pair, delta: Pair, A: Pair, B: Pair, C: Pair, D: OptionalPair, z: Tensor | None, delta_bias: OptionalPair, *,
    softplus: bool,
) -> Tensor:  # fmt: skip
    """Scan as `fused.bidirectional_scan` says, on a CPU."""
    return _scan(u, delta, A, B, C, D, delta_bias, z, None, softplus, (False, True))[0]


def _scan(
    u: Pair, delta: Pair, A: Pair, B: Pair, C: Pair, D: OptionalPair, delta_bias: OptionalPair, z: Tensor | None,
    initial_state: Tensor | None, softplus: bool, reverses: tuple[bool, ...],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Call the operator with all tensors in the dtype of the computation; y (B, L, E) has u's dtype."""
    dtype, device = u[0].dtype, u[0].device
    precise = accumulation_dtype(dtype)
    with no_autocast(device):
        pairs = [[None if x is None else x.to(precise) for x in pair] for pair in (u, delta, A, B, C, D, delta_bias)]
        z, initial_state = (None if x is None else x.to(precise) for x in (z, initial_state))
        keep = wants_gradients(*pairs, z, initial_state)
        y, final, _, _ = _selective_scan(*pairs, z, initial_state, softplus, list(reverses), keep)
        return y.to(dtype), final


def scan_struct(
    u: Pair, delta: Pair, A: Pair, B: Pair, C: Pair, D: OptionalPair, delta_bias: OptionalPair, z: Tensor | None,
    initial_state: Tensor | None, softplus: bool, A_is_log: bool, reverses: Sequence[bool], y: Tensor, pre_gate: Tensor | None,
    final: Tensor | None, chunks: Tensor | None, dt_proj: OptionalPair = (None, None),
) -> tuple[Any, ...]:  # fmt: skip
    """Return the members of the kernel's `Scan`; all tensors of the tokens are `dense`, the others contiguous.

    With `dt_proj` (E, R) `delta` are rows that begin with dt (B, L, R).
    """
    (clips, L, E), N, K = y.shape, A[0].shape[1], len(reverses)
    G = max((x.shape[2] for x in (B[0], C[0]) if x.dim() == 4), default=1)
    R = 0 if dt_proj[0] is None else dt_proj[0].shape[1]
    head = K, clips, L, E, N, G, R, softplus, A_is_log, torch.get_num_threads()
    z_strides = (0, 0) if z is None else z.stride()[:2]
    members = [*head, z, *z_strides, initial_state, y, pre_gate, final, chunks]
    for k in range(K):
        members += u[k], delta[k], A[k], B[k], C[k], D[k], delta_bias[k], dt_proj[k], *u[k].stride()[:2], *delta[k].stride()[:2]
        members += *_strides(B[k]), *_strides(C[k]), reverses[k]
    return (*members, *(0,) * (19 * (2 - K)))


def _strides(x: Tensor) -> tuple[int, int, int]:
    """Return the strides of clips, tokens and groups of B or C."""
    strides = x.stride()
    return strides[0], strides[1], strides[2] if x.dim() == 4 and x.shape[2] > 1 else 0


def _inputs(
    u: Pair, delta: Pair, A: Pair, B: Pair, C: Pair, D: OptionalPair, delta_bias: OptionalPair, z: Tensor | None,
    initial_state: Tensor | None,
) -> tuple[Any, ...]:  # fmt: skip
    """Return the inputs as `scan_struct` takes them."""
    tokens = ([dense(x) for x in pair] for pair in (u, delta))
    mixing = ([dense(x) for x in pair] for pair in (B, C))
    others = ([None if x is None else x.contiguous() for x in pair] for pair in (D, delta_bias))
    z, initial_state = None if z is None else dense(z), None if initial_state is None else initial_state.contiguous()
    return *tokens, [x.contiguous() for x in A], *mixing, *others, z, initial_state


def kept_shape(clips: Size, L: Size, E: Size, N: Size, K: int, G: Size, dtype: torch.dtype) -> tuple[Size, ...]:
    """Return the shape of the states that enter the chunks of every block of channels."""
    lanes = 64 // dtype.itemsize
    return K, clips, G * -(-(E // G) // lanes), -(-L // CHUNK), N, lanes


def _forward(
    u: Pair, delta: Pair, A: Pair, B: Pair, C: Pair, D: OptionalPair, delta_bias: OptionalPair, z: Tensor | None,
    initial_state: Tensor | None, softplus: bool, reverses: Sequence[bool], keep: bool,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Return y (B, L, E), final states (K, B, E, N), and if `keep` y before the gate and the states entering chunks."""
    y, final, *kept = _forward_shapes(u, delta, A, B, C, D, delta_bias, z, initial_state, softplus, reverses, keep)
    pre_gate, chunks = (x if keep else None for x in kept)
    pre_gate = None if z is None else pre_gate
    inputs: Any = _inputs(u, delta, A, B, C, D, delta_bias, z, initial_state)
    struct = scan_struct(*(*inputs, softplus, False, reverses, y, pre_gate, final, chunks))
    cpu_library.call("scan_forward", y.dtype, struct)
    return y, final, pre_gate, chunks


def _forward_shapes(
    u: Pair, delta: Pair, A: Pair, B: Pair, C: Pair, D: OptionalPair, delta_bias: OptionalPair, z: Tensor | None,
    initial_state: Tensor | None, softplus: bool, reverses: Sequence[bool], keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    (clips, L, E), N, K = u[0].shape, A[0].shape[1], len(reverses)
    G = max((x.shape[2] for x in (B[0], C[0]) if x.dim() == 4), default=1)
    kept = kept_shape(clips, L, E, N, K, G, u[0].dtype) if keep else (0,)
    pre_gate = (clips, L, E) if keep and z is not None else (0,)
    empty = u[0].new_empty
    return empty((clips, L, E)), empty((K, clips, E, N)), empty(pre_gate), empty(kept)


def _backward(
    u: Pair, delta: Pair, A: Pair, B: Pair, C: Pair, D: OptionalPair, delta_bias: OptionalPair, z: Tensor | None,
    initial_state: Tensor | None, softplus: bool, reverses: Sequence[bool], y_pre_gate: Tensor | None, chunk_states: Tensor,
    dy: Tensor | None, dfinal_states: Tensor | None,
) -> tuple[Any, ...]:  # fmt: skip
    """Return the gradients of all tensors, in their shapes and order; None for None."""
    (clips, L, E), N = u[0].shape, A[0].shape[1]
    G = max((x.shape[2] for x in (B[0], C[0]) if x.dim() == 4), default=1)
    inputs: Any = _inputs(u, delta, A, B, C, D, delta_bias, z, initial_state)
    new = u[0].new_empty
    du, ddelta = ([new(u[0].shape) for _ in reverses] for _ in range(2))
    dB, dC = ([new((clips, L, G, N)) for _ in reverses] for _ in range(2))
    dA = [new((E, N)) for _ in reverses]
    dD, dbias = ([None if x is None else new(E) for x in pair] for pair in (D, delta_bias))
    dz, dinitial = (None if x is None else new(x.shape) for x in (z, initial_state))
    struct = scan_struct(*(*inputs, softplus, False, reverses, du[0], none_if_empty(y_pre_gate), dA[0], chunk_states))
    dy, dfinal_states = None if dy is None else dense(dy), None if dfinal_states is None else dfinal_states.contiguous()
    cpu_library.call(
        "scan_backward", u[0].dtype, struct,
        gradients_struct(dy, dfinal_states, du, ddelta, dB, dC, dA, dD, dbias, dz, dinitial),
    )  # fmt: skip
    dB, dC = ([_of_groups(g, x) for g, x in zip(*pair, strict=True)] for pair in ((dB, B), (dC, C)))
    return du, ddelta, dA, dB, dC, dD, dbias, dz, dinitial


def _of_groups(grad: Tensor, x: Tensor) -> Tensor:
    """Return the gradient of B or C, which may have one group for all, of that of every group (B, L, G, N)."""
    return grad.sum(2) if x.dim() == 3 else grad if grad.shape == x.shape else grad.sum(2, keepdim=True)


def gradients_struct(
    dy: Tensor | None, dfinal: Tensor | None, du: Pair, ddelta: Pair, dB: Pair, dC: Pair, dA: Pair, dD: OptionalPair,
    dbias: OptionalPair, dz: Tensor | None, dinitial: Tensor | None, ddt: OptionalPair = (None, None),
    d_dt_proj: OptionalPair = (None, None),
) -> tuple[Any, ...]:  # fmt: skip
    """Return the members of the kernel's `Gradients`; dB and dC are (B, L, G, N), of the same strides.

    `ddt` (B, L, R), of dt's strides, and `d_dt_proj` (E, R) are the gradients of the rows and of dt_proj of `scan_struct`.
    """
    K, (clips, L, G, N), E = len(du), dB[0].shape, du[0].shape[2]
    blocks = -(-(E // G) * du[0].element_size() // 64)
    parts = G * -(-blocks // PART)
    num_sums = N + 2 + (0 if d_dt_proj[0] is None else d_dt_proj[0].shape[1])
    shares, by_clip = du[0].new_empty((parts, K, clips, L, 2 * N)), du[0].new_empty((clips, K, E, num_sums))

    def both(pair: Sequence[Any]) -> tuple[Any, ...]:
        return (*pair, None)[:2]

    return (
        *((0, 0) if dy is None else dy.stride()[:2]), dy, dfinal, *both(du), *both(ddelta), *both(dB), *both(dC),
        *dB[0].stride()[:3], *both(dA), *both(dD), *both(dbias), dz, dinitial, *((0, 0) if dz is None else dz.stride()[:2]),
        *both(ddt), *both(d_dt_proj), shares, by_clip,
    )  # fmt: skip


def _backward_shapes(
    u: Pair, delta: Pair, A: Pair, B: Pair, C: Pair, D: OptionalPair, delta_bias: OptionalPair, z: Tensor | None,
    initial_state: Tensor | None, softplus: bool, reverses: Sequence[bool], y_pre_gate: Tensor | None, chunk_states: Tensor,
    dy: Tensor | None, dfinal_states: Tensor | None,
) -> tuple[Any, ...]:  # fmt: skip
    def like(x: Tensor | None) -> Tensor:
        return u[0].new_empty(0 if x is None else x.shape)

    pairs = (u, delta, A, B, C, D, delta_bias)
    return *([like(x) for x in pair] for pair in pairs), like(z), like(initial_state)


_INPUTS = (
    "Tensor[] u, Tensor[] delta, Tensor[] A, Tensor[] B, Tensor[] C, Tensor?[] D, Tensor?[] delta_bias, Tensor? z, "
    "Tensor? initial_state, bool softplus, bool[] reverses"
)
_selective_scan_backward = register(
    f"selective_scan_cpu_backward({_INPUTS}, Tensor? y_pre_gate, Tensor chunk_states, Tensor? dy, Tensor? dfinal_states) -> "
    "(Tensor[] du, Tensor[] ddelta, Tensor[] dA, Tensor[] dB, Tensor[] dC, Tensor[] dD, Tensor[] ddelta_bias, Tensor dz, "
    "Tensor dinitial_state)",  # empty for what is None
    _backward,
    _backward_shapes,
)
_selective_scan = register(
    f"selective_scan_cpu({_INPUTS}, bool keep) -> (Tensor y, Tensor final_states, Tensor y_pre_gate, Tensor chunk_states)",
    _forward,
    _forward_shapes,
    _selective_scan_backward,
)
