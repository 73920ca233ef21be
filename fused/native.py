"""Backend `native`: the kernels of `fused.kernels` as operators that PyTorch knows, with gradients.

Each is registered in the library `videomamba` with what `torch.compile` must know of its results, and is opaque to it:
forward and backward are one operator each. Streams (u, delta, z, B, C) are read in place through their strides.
"""

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .kernels import conv, scan

_library = torch.library.Library("videomamba", "FRAGMENT")
_invariant = False


@contextlib.contextmanager
def batch_invariant(on: bool = True) -> Iterator[None]:
    """Within, native kernels cut time as for a batch of one, so that a clip's bits do not depend on its neighbours.

    Otherwise the cut of the scan depends on the batch, which is faster where the clips alone fill the GPU.
    """
    global _invariant
    before, _invariant = _invariant, on
    try:
        yield
    finally:
        _invariant = before


def _plan(u: Tensor, N: int, directions: int, invariant: bool) -> scan.Plan:
    B, L, E = u.shape
    return scan.plan(1 if invariant else B, L, E, N, directions, scan.processors(u.device))


def _unit(x: Tensor | None) -> Tensor | None:
    return x if x is None or x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


# ---------------------------------------------------------------- selective scan

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
        width, done = u.shape[2] // groups, []
        for g in range(groups):
            e = slice(g * width, (g + 1) * width)
            wide = (None if x is None else x[e] for x in (D, delta_bias))
            mix = (x if x.dim() == 3 else x[:, :, g] for x in (B, C))
            gate, state = None if z is None else z[..., e], None if initial_state is None else initial_state[:, e]
            done.append(
                selective_scan(
                    u[..., e], delta[..., e], A[e], *mix, next(wide), gate, next(wide),
                    softplus=softplus, initial_state=state, reverse=reverse,
                )  # fmt: skip
            )
        ys, states = zip(*done, strict=True)
        return torch.cat(ys, 2), torch.cat(states, 1)
    B, C = (x.flatten(2) if x.dim() == 4 else x for x in (B, C))
    streams, wide = (u, delta, B, C, z), (A, D, delta_bias, initial_state)
    if any(x is not None and x.dtype != u.dtype for x in streams):
        streams = tuple(None if x is None else x.float() for x in streams)
    A, D, delta_bias, initial_state = (None if x is None else x.float() for x in wide)
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (*streams, *wide))
    first, delta, B, C, z = streams
    args = (first, delta, A, B, C, D, z, delta_bias, initial_state, softplus, reverse, _invariant, keep)
    y, final, _, _ = torch.ops.videomamba.selective_scan(*args)
    return y.to(u.dtype), final



def _streams(u, delta, A, B, C, D, z, bias, softplus, reverse) -> scan.Streams:
    """One direction's, as the kernels take them."""
    one = lambda x: (None if x is None else x.contiguous(),)  # noqa: E731
    tokens = tuple((_unit(x),) for x in (u, delta))
    mix = tuple((_unit(x),) for x in (B, C))
    return scan.Streams((reverse,), *tokens, one(A), *mix, one(D), one(bias), _unit(z), softplus)


@torch.library.impl(_library, "selective_scan", "CompositeExplicitAutograd")
def _scan(u, delta, A, B, C, D, z, bias, initial, softplus, reverse, invariant, keep):
    s = _streams(u, delta, A, B, C, D, z, bias, softplus, reverse)
    plan = _plan(u, A.shape[1], 1, invariant)
    initial = None if initial is None else initial.contiguous()
    r = scan.forward(s, initial, plan, ungated=keep and z is not None, marks=keep)
    nothing = A.new_empty(0)
    ungated = r.ungated if keep and z is not None else u.new_empty(0)
    return r.y, r.final[0], ungated, r.marks if keep else nothing


@torch.library.register_fake("videomamba::selective_scan", lib=_library)
def _(u, delta, A, B, C, D, z, bias, initial, softplus, reverse, invariant, keep):
    Bn, L, E = u.shape
    N = A.shape[1]
    plan = _plan(u, N, 1, invariant)
    ungated = u.new_empty((Bn, L, E)) if keep and z is not None else u.new_empty(0)
    marks = A.new_empty((1, Bn, plan.splits * plan.span // scan.TILE, E, N)) if keep else A.new_empty(0)
    return u.new_empty((Bn, L, E)), A.new_empty((Bn, E, N)), ungated, marks


@torch.library.impl(_library, "selective_scan_backward", "CompositeExplicitAutograd")
def _scan_backward(dy, dfinal, ungated, marks, u, delta, A, B, C, D, z, bias, initial, softplus, reverse, invariant):
    s = _streams(u, delta, A, B, C, D, z, bias, softplus, reverse)
    plan = _plan(u, A.shape[1], 1, invariant)
    dB, dC = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (B, C))
    dfinal = None if dfinal is None else dfinal.contiguous().unsqueeze(0)
    g = scan.backward(s, _unit(dy), dfinal, marks, ungated if z is not None else None, plan, [dB], [dC])
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
