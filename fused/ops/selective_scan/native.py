"""The selective scan as operators `videomamba::selective_scan` and `videomamba::bidirectional_scan`."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fused.ops.selective_scan import launch as scan
from fused.ops.selective_scan import schedule
from fused.runtime.checks import no_autocast
from fused.runtime.library import wants_gradients
from fused.runtime.modes import is_batch_invariant

_library = torch.library.Library("videomamba", "FRAGMENT")


def plan(u: Tensor, N: int | torch.SymInt, directions: int, invariant: bool) -> schedule.ScanSchedule:
    """How the kernels cut u (B, L, E); `invariant` cuts as for a batch of one."""
    B, L, E = map(int, u.shape)
    return schedule.make_schedule(B, L, E, int(N), directions, schedule.multiprocessors(u.device), batch_invariant=invariant)


def dense(x: Tensor) -> Tensor:
    """With unit stride along channels or states."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def aligned(x: Tensor) -> Tensor:
    """Contiguous, and from an address where four float32 can be read at once."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def whole(x: Tensor | None) -> Tensor | None:
    """`aligned`, if it is there."""
    return None if x is None else aligned(x)


def streams(reverses, u, delta, A, B, C, D, z, bias, softplus) -> scan.Streams:
    """As the kernels take them; all but z by direction. The two of a pair have the same strides."""

    def tokens(pair):
        pair = tuple(map(dense, pair))
        same = all(x.stride() == pair[0].stride() for x in pair)
        return pair if same else tuple(x.contiguous() for x in pair)

    def wide(pair):
        return tuple(map(whole, pair))

    return scan.Streams(
        reverses,
        tokens(u),
        tokens(delta),
        wide(A),
        tokens(B),
        tokens(C),
        wide(D),
        wide(bias),
        None if z is None else dense(z),
        softplus,
    )


def _forward(s: scan.Streams, initial: Tensor | None, invariant: bool, keep: bool):
    """y, the final states, and what the backward reads, empty unless `keep`."""
    cut = plan(s.u[0], s.sizes[3], len(s.reverses), invariant)
    r = scan.forward(s, initial, cut, keep=keep)
    ungated = r.ungated if keep and s.z is not None else s.u[0].new_empty(0)
    return r.y, r.final, ungated, r.marks if keep else s.A[0].new_empty(0)


def _backward(s: scan.Streams, dy: Tensor, dfinal: Tensor | None, ungated: Tensor, marks: Tensor, invariant: bool):
    """Gradients of u, delta, A, B, C, D and bias by direction, of z, and of the states; empty for what is not there."""
    cut = plan(s.u[0], s.sizes[3], len(s.reverses), invariant)
    dB, dC = ([torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in pair] for pair in (s.B, s.C))
    g = scan.backward(s, dense(dy), dfinal, marks, ungated if s.z is not None else None, cut, dB, dC)
    nothing = dy.new_empty(0)
    pairs = (g.D, s.D), (g.bias, s.bias)
    D, bias = ([nothing if asked is None else x for x, asked in zip(*pair, strict=True)] for pair in pairs)
    return (g.u, g.delta, g.A, dB, dC, D, bias), nothing.clone() if g.z is None else g.z, g.initial


def _register_gradient(name: str, finals: int, options: int) -> None:
    """Of an operator (*tensors, *options) -> (y, *finals, ungated, marks), by its twin `_backward`, which lacks the last
    option, `keep`."""

    def setup(ctx, inputs, output):
        ctx.how = inputs[-options:-1]
        ctx.mark_non_differentiable(*output[-2:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*output[-2:], *inputs[:-options])

    def gradient(ctx, dy, *others):
        ungated, marks, *tensors = ctx.saved_tensors
        dy = torch.zeros_like(tensors[0]) if dy is None else dy
        backward = getattr(torch.ops.videomamba, f"{name}_backward")
        grads = backward(dy, *others[:finals], ungated, marks, *tensors, *ctx.how)
        return *(None if x is None else g for g, x in zip(grads, tensors, strict=True)), *[None] * options

    def again(ctx, *grads):
        raise RuntimeError(f"{name}: trying to differentiate twice; use backend='torch' or reference for what can be")

    def shapes(dy, *others):
        tensors = others[finals + 2 : 1 - options]
        return tuple(dy.new_empty(0) if x is None else x.new_empty(x.shape) for x in tensors)

    torch.library.register_autograd(f"videomamba::{name}", gradient, setup_context=setup, lib=_library)
    torch.library.register_autograd(f"videomamba::{name}_backward", again, lib=_library)  # else it is taken for constant
    torch.library.register_fake(f"videomamba::{name}_backward", shapes, lib=_library)


# ---------------------------------------------------------------- one direction

_SCAN = "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? bias, Tensor? initial"
_library.define(
    f"selective_scan({_SCAN}, bool softplus, bool reverse, bool invariant, bool keep)"
    " -> (Tensor y, Tensor final, Tensor ungated, Tensor marks)"
)
_library.define(
    f"selective_scan_backward(Tensor dy, Tensor? dfinal, Tensor ungated, Tensor marks, {_SCAN},"
    " bool softplus, bool reverse, bool invariant)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def selective_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None, delta_bias: Tensor | None,
    *, softplus: bool, initial_state: Tensor | None, reverse: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`fused.selective_scan` by native kernels; groups of channels are scans of their own."""
    if A.shape[1] > scan.LONGEST_STATE:
        raise ValueError(f"selective_scan: backend 'native' has N up to {scan.LONGEST_STATE}, got N={A.shape[1]}")
    groups = max(x.shape[2] if x.dim() == 4 else 1 for x in (B, C))
    if groups > 1:
        width, ys, states = u.shape[2] // groups, [], []
        for g in range(groups):
            e = slice(g * width, (g + 1) * width)
            own_B, own_C = (x if x.dim() == 3 else x[:, :, g] for x in (B, C))
            own_D, bias = (None if x is None else x[e] for x in (D, delta_bias))
            gate, state = None if z is None else z[..., e], None if initial_state is None else initial_state[:, e]
            y, state = selective_scan(
                u[..., e], delta[..., e], A[e], own_B, own_C, own_D, gate, bias,
                softplus=softplus, initial_state=state, reverse=reverse,
            )  # fmt: skip
            ys.append(y)
            states.append(state)
        with no_autocast(u.device):
            return torch.cat(ys, 2), torch.cat(states, 1)
    B, C = (x.flatten(2) if x.dim() == 4 else x for x in (B, C))
    narrow = _alike((u, delta, B, C, z))
    wide = [None if x is None else x.float() for x in (A, D, delta_bias, initial_state)]
    keep = wants_gradients(*narrow, *wide)
    tensors = (*narrow[:2], wide[0], *narrow[2:4], wide[1], narrow[4], *wide[2:])
    y, final, _, _ = torch.ops.videomamba.selective_scan(*tensors, softplus, reverse, is_batch_invariant(), keep)
    return y.to(u.dtype), final


def _alike(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """As they are if all have the first one's dtype, else in float32, which holds them all."""
    given = [x for x in tensors if x is not None]
    same = all(x.dtype == given[0].dtype for x in given)
    return [x if same or x is None else x.float() for x in tensors]


@torch.library.impl(_library, "selective_scan", "CompositeExplicitAutograd")
def _scan(u, delta, A, B, C, D, z, bias, initial, softplus, reverse, invariant, keep):
    s = streams((reverse,), (u,), (delta,), (A,), (B,), (C,), (D,), z, (bias,), softplus)
    y, final, ungated, marks = _forward(s, whole(initial), invariant, keep)
    return y, final[0], ungated, marks


@torch.library.register_fake("videomamba::selective_scan", lib=_library)
def _(u, delta, A, B, C, D, z, bias, initial, softplus, reverse, invariant, keep):
    Bn, L, E = u.shape
    N = A.shape[1]
    ungated = u.new_empty((Bn, L, E)) if keep and z is not None else u.new_empty(0)
    marks = A.new_empty((1, Bn, -(-L // schedule.TILE), E, N)) if keep else A.new_empty(0)
    return u.new_empty((Bn, L, E)), A.new_empty((Bn, E, N)), ungated, marks


@torch.library.impl(_library, "selective_scan_backward", "CompositeExplicitAutograd")
def _scan_backward(dy, dfinal, ungated, marks, u, delta, A, B, C, D, z, bias, initial, softplus, reverse, invariant):
    s = streams((reverse,), (u,), (delta,), (A,), (B,), (C,), (D,), z, (bias,), softplus)
    grads, dz, dinitial = _backward(s, dy, whole(dfinal), ungated, marks, invariant)
    du, ddelta, dA, dB, dC, dD, dbias = (one for (one,) in grads)
    return du, ddelta, dA, dB, dC, dD, dz, dbias, dinitial[0].clone() if initial is not None else dy.new_empty(0)


_register_gradient("selective_scan", finals=1, options=4)


# ---------------------------------------------------------------- both directions

_BOTH = (
    "Tensor u0, Tensor u1, Tensor delta0, Tensor delta1, Tensor A0, Tensor A1, Tensor B0, Tensor B1, Tensor C0, Tensor C1,"
    " Tensor? D0, Tensor? D1, Tensor? bias0, Tensor? bias1, Tensor? z"
)
_library.define(
    f"bidirectional_scan({_BOTH}, bool softplus, bool invariant, bool keep) -> (Tensor y, Tensor ungated, Tensor marks)"
)
_library.define(
    f"bidirectional_scan_backward(Tensor dy, Tensor ungated, Tensor marks, {_BOTH}, bool softplus, bool invariant) -> ("
    + ", ".join(["Tensor"] * 15) + ")"
)  # fmt: skip


def bidirectional_scan(u, delta, A, B, C, D, z, delta_bias, *, softplus: bool) -> Tensor:
    """`fused.bidirectional_scan` by one native kernel; B and C without groups."""
    if A[0].shape[1] > scan.LONGEST_STATE:
        raise ValueError(f"bidirectional_scan: backend 'native' has N up to {scan.LONGEST_STATE}, got N={A[0].shape[1]}")
    narrow = _alike((*u, *delta, *B, *C, z))
    wide = [None if x is None else x.float() for x in (*A, *D, *delta_bias)]
    keep = wants_gradients(*narrow, *wide)
    args = (*narrow[:4], *wide[:2], *narrow[4:8], *wide[2:], narrow[8])
    return torch.ops.videomamba.bidirectional_scan(*args, softplus, is_batch_invariant(), keep)[0].to(u[0].dtype)


def _pairs(tensors: Sequence[Any]) -> dict[str, Any]:
    """The flat arguments of the operator by name."""
    names = ("u", "delta", "A", "B", "C", "D", "bias")
    return {name: (tensors[2 * i], tensors[2 * i + 1]) for i, name in enumerate(names)} | {"z": tensors[14]}


@torch.library.impl(_library, "bidirectional_scan", "CompositeExplicitAutograd")
def _both(*args):
    *tensors, softplus, invariant, keep = args
    s = streams((False, True), **_pairs(tensors), softplus=softplus)
    y, _, ungated, marks = _forward(s, None, invariant, keep)
    return y, ungated, marks


@torch.library.register_fake("videomamba::bidirectional_scan", lib=_library)
def _(*args):
    *tensors, softplus, invariant, keep = args
    u, A, z = tensors[0], tensors[4], tensors[14]
    (B, L, E), N = u.shape, A.shape[1]
    ungated = u.new_empty((B, L, E)) if keep and z is not None else u.new_empty(0)
    marks = A.new_empty((2, B, -(-L // schedule.TILE), E, N)) if keep else A.new_empty(0)
    return u.new_empty((B, L, E)), ungated, marks


@torch.library.impl(_library, "bidirectional_scan_backward", "CompositeExplicitAutograd")
def _both_backward(dy, ungated, marks, *args):
    *tensors, softplus, invariant = args
    s = streams((False, True), **_pairs(tensors), softplus=softplus)
    grads, dz, _ = _backward(s, dy, None, ungated, marks, invariant)
    return *(x for pair in grads for x in pair), dz


_register_gradient("bidirectional_scan", finals=0, options=3)
