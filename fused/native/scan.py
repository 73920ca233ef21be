"""The selective scan as operators `videomamba::selective_scan` and `videomamba::bidirectional_scan`."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fused.backends import invariant
from fused.kernels import cuts, scan

_library = torch.library.Library("videomamba", "FRAGMENT")


def plan(u: Tensor, N: int | torch.SymInt, directions: int, invariant: bool) -> cuts.Plan:
    """How the kernels cut u (B, L, E); `invariant` cuts as for a batch of one."""
    B, L, E = map(int, u.shape)
    return cuts.plan(B, L, E, int(N), directions, cuts.processors(u.device), invariant=invariant)


def _dense(x: Tensor) -> Tensor:
    """With unit stride along channels or states."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def whole(x: Tensor | None) -> Tensor | None:
    """Contiguous, and from an address where four float32 can be read at once."""
    x = None if x is None else x.contiguous()
    return x if x is None or x.data_ptr() % 16 == 0 else x.clone()


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
        return torch.cat(ys, 2), torch.cat(states, 1)
    B, C = (x.flatten(2) if x.dim() == 4 else x for x in (B, C))
    narrow = _alike((u, delta, B, C, z))
    wide = [None if x is None else x.float() for x in (A, D, delta_bias, initial_state)]
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (*narrow, *wide))
    tensors = (*narrow[:2], wide[0], *narrow[2:4], wide[1], narrow[4], *wide[2:])
    y, final, _, _ = torch.ops.videomamba.selective_scan(*tensors, softplus, reverse, invariant(), keep)
    return y.to(u.dtype), final


def _alike(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """As they are if all have the first one's dtype, else in float32, which holds them all."""
    given = [x for x in tensors if x is not None]
    same = all(x.dtype == given[0].dtype for x in given)
    return [x if same or x is None else x.float() for x in tensors]


def streams(reverses, u, delta, A, B, C, D, z, bias, softplus, logarithm=False) -> scan.Streams:
    """As the kernels take them; all but z by direction. The two of a pair have the same strides."""

    def tokens(pair):
        pair = tuple(map(_dense, pair))
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
        None if z is None else _dense(z),
        softplus,
        logarithm,
    )


@torch.library.impl(_library, "selective_scan", "CompositeExplicitAutograd")
def _scan(u, delta, A, B, C, D, z, bias, initial, softplus, reverse, invariant, keep):
    s = streams((reverse,), (u,), (delta,), (A,), (B,), (C,), (D,), z, (bias,), softplus)
    cut = plan(u, A.shape[1], 1, invariant)
    r = scan.forward(s, whole(initial), cut, keep=keep)
    nothing = A.new_empty(0)
    ungated = r.ungated if keep and z is not None else u.new_empty(0)
    return r.y, r.final[0], ungated, r.marks if keep else nothing


@torch.library.register_fake("videomamba::selective_scan", lib=_library)
def _(u, delta, A, B, C, D, z, bias, initial, softplus, reverse, invariant, keep):
    Bn, L, E = u.shape
    N = A.shape[1]
    ungated = u.new_empty((Bn, L, E)) if keep and z is not None else u.new_empty(0)
    marks = A.new_empty((1, Bn, -(-L // cuts.TILE), E, N)) if keep else A.new_empty(0)
    return u.new_empty((Bn, L, E)), A.new_empty((Bn, E, N)), ungated, marks


@torch.library.impl(_library, "selective_scan_backward", "CompositeExplicitAutograd")
def _scan_backward(dy, dfinal, ungated, marks, u, delta, A, B, C, D, z, bias, initial, softplus, reverse, invariant):
    s = streams((reverse,), (u,), (delta,), (A,), (B,), (C,), (D,), z, (bias,), softplus)
    cut = plan(u, A.shape[1], 1, invariant)
    dB, dC = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (B, C))
    g = scan.backward(s, _dense(dy), whole(dfinal), marks, ungated if z is not None else None, cut, [dB], [dC])
    nothing = A.new_empty(0)
    dz = u.new_empty(0) if g.z is None else g.z
    return (
        g.u[0], g.delta[0], g.A[0].clone(), dB, dC, g.D[0].clone() if D is not None else nothing, dz,
        g.bias[0].clone() if bias is not None else nothing, g.initial[0].clone() if initial is not None else nothing,
    )  # fmt: skip


@torch.library.register_fake("videomamba::selective_scan_backward", lib=_library)
def _(dy, dfinal, ungated, marks, u, delta, A, B, C, D, z, bias, initial, softplus, reverse, invariant):
    like = lambda x, other: other.new_empty(0 if x is None else x.shape)  # noqa: E731
    u, delta, B, C = (x.new_empty(x.shape) for x in (u, delta, B, C))
    return u, delta, A.new_empty(A.shape), B, C, like(D, A), like(z, u), like(bias, A), like(initial, A)


def _scan_setup(ctx, inputs, output):
    *tensors, ctx.softplus, ctx.reverse, ctx.invariant, _ = inputs
    _, _, ungated, marks = output
    ctx.mark_non_differentiable(ungated, marks)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(ungated, marks, *tensors)


def _scan_gradient(ctx, dy, dfinal, *_):
    ungated, marks, *tensors = ctx.saved_tensors
    dy = torch.zeros_like(tensors[0]) if dy is None else dy
    args = (dy, dfinal, ungated, marks, *tensors, ctx.softplus, ctx.reverse, ctx.invariant)
    grads = torch.ops.videomamba.selective_scan_backward(*args)
    return *(None if x is None else g for g, x in zip(grads, tensors, strict=True)), None, None, None, None


torch.library.register_autograd("videomamba::selective_scan", _scan_gradient, setup_context=_scan_setup, lib=_library)


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
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (*narrow, *wide))
    args = (*narrow[:4], *wide[:2], *narrow[4:8], *wide[2:], narrow[8])
    return torch.ops.videomamba.bidirectional_scan(*args, softplus, invariant(), keep)[0].to(u[0].dtype)


def _pairs(tensors: Sequence[Any]) -> dict[str, Any]:
    """The flat arguments of the operator by name."""
    names = ("u", "delta", "A", "B", "C", "D", "bias")
    return {name: (tensors[2 * i], tensors[2 * i + 1]) for i, name in enumerate(names)} | {"z": tensors[14]}


@torch.library.impl(_library, "bidirectional_scan", "CompositeExplicitAutograd")
def _both(*args):
    *tensors, softplus, invariant, keep = args
    s = streams((False, True), **_pairs(tensors), softplus=softplus)
    cut = plan(s.u[0], s.sizes[3], 2, invariant)
    r = scan.forward(s, None, cut, keep=keep)
    u, A = s.u[0], s.A[0]
    return r.y, r.ungated if keep and s.z is not None else u.new_empty(0), r.marks if keep else A.new_empty(0)


@torch.library.register_fake("videomamba::bidirectional_scan", lib=_library)
def _(*args):
    *tensors, softplus, invariant, keep = args
    u, A, z = tensors[0], tensors[4], tensors[14]
    (B, L, E), N = u.shape, A.shape[1]
    ungated = u.new_empty((B, L, E)) if keep and z is not None else u.new_empty(0)
    marks = A.new_empty((2, B, -(-L // cuts.TILE), E, N)) if keep else A.new_empty(0)
    return u.new_empty((B, L, E)), ungated, marks


@torch.library.impl(_library, "bidirectional_scan_backward", "CompositeExplicitAutograd")
def _both_backward(dy, ungated, marks, *args):
    *tensors, softplus, invariant = args
    s = streams((False, True), **_pairs(tensors), softplus=softplus)
    cut = plan(s.u[0], s.sizes[3], 2, invariant)
    dB, dC = ([torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in pair] for pair in (s.B, s.C))
    g = scan.backward(s, _dense(dy), None, marks, ungated if s.z is not None else None, cut, dB, dC)
    nothing = dy.new_empty(0)
    own = [[nothing if asked is None else x.clone() for x, asked in zip(*pair, strict=True)]  # results share no memory
           for pair in ((g.A, s.A), (g.D, s.D), (g.bias, s.bias))]  # fmt: skip
    return *g.u, *g.delta, *own[0], *dB, *dC, *own[1], *own[2], nothing.clone() if g.z is None else g.z


@torch.library.register_fake("videomamba::bidirectional_scan_backward", lib=_library)
def _(dy, ungated, marks, *args):
    return tuple(dy.new_empty(0) if x is None else x.new_empty(x.shape) for x in args[:15])


def _both_setup(ctx, inputs, output):
    *tensors, ctx.softplus, ctx.invariant, _ = inputs
    _, ungated, marks = output
    ctx.mark_non_differentiable(ungated, marks)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(ungated, marks, *tensors)


def _both_gradient(ctx, dy, *_):
    ungated, marks, *tensors = ctx.saved_tensors
    dy = torch.zeros_like(ungated) if dy is None else dy
    grads = torch.ops.videomamba.bidirectional_scan_backward(dy, ungated, marks, *tensors, ctx.softplus, ctx.invariant)
    return *(None if x is None else g for g, x in zip(grads, tensors, strict=True)), None, None, None


torch.library.register_autograd("videomamba::bidirectional_scan", _both_gradient, setup_context=_both_setup, lib=_library)
