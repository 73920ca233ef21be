"""The selective scan: one linear recurrence per channel and state, with a decay that depends on the token.

    delta_t = softplus(delta_t + delta_bias)
    s_t     = exp(delta_t * A) * s_{t-1} + delta_t * u_t * B_t
    y_t     = (sum_n C_t * s_t + D * u_t) * silu(z_t)

B batch, L tokens, E channels, N states per channel, G groups of channels that share B and C.
"""

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from fused import backends
from fused.backends import NATIVE, TORCH, Abilities
from fused.ops import mamba_ssm as upstream
from fused.ops.selective_scan import export as traceable
from fused.ops.selective_scan.recurrence import Recurrence, plan
from fused.runtime.checks import check_tensor, no_autocast
from fused.runtime.dtypes import KERNEL_DTYPES, accumulation_dtype
from fused.runtime.elementwise import clipwise

Tokens = Float[Tensor, "B L E"]
Mixing = Float[Tensor, "B L *G N"]
State = Float[Tensor, "B E N"]
Pair = tuple[Tensor, Tensor]
_PAIRED = ("u", "delta", "A", "B", "C", "D", "delta_bias")


BACKENDS = {
    "native": NATIVE,
    "mamba_ssm": Abilities(False, False, True, True, KERNEL_DTYPES, ("cuda",)),
    "torch": replace(TORCH, fullgraph=False),
}
"""Abilities of the backends that have this operator."""


def selective_scan(
    u: Tokens,
    delta: Tokens,
    A: Float[Tensor, "E N"],
    B: Mixing,
    C: Mixing,
    D: Float[Tensor, " E"] | None = None,
    z: Tokens | None = None,
    delta_bias: Float[Tensor, " E"] | None = None,
    *,
    softplus: bool = True,
    initial_state: State | None = None,
    reverse: bool = False,
    backend: str = "auto",
) -> tuple[Tokens, State]:
    """Scan `u` along its tokens and return (y, final_state).

    Computes in at least float32 whatever the dtypes of the arguments; y has u's dtype, the state at least float32.
    Channel e uses group e // (E // G) of B and C. `reverse` walks from token L-1 to 0: `initial_state` then enters at
    the end, and `final_state` is the state after token 0. Gradients reach every tensor and flow from both results.

    Raises TypeError or ValueError for an argument that does not fit, ValueError for what the backend cannot do,
    BackendError for a backend that cannot run here.

        >>> u, delta = torch.randn(2, 63, 8), torch.randn(2, 63, 8)
        >>> A, B, C = -torch.rand(8, 4), torch.randn(2, 63, 4), torch.randn(2, 63, 4)
        >>> y, state = selective_scan(u, delta, A, B, C)
    """
    _check(u, delta, A, B, C, D, z, delta_bias, initial_state)
    asked = {"initial_state": initial_state is not None, "reverse": reverse, "groups": B.dim() == 4 or C.dim() == 4}
    backends.check_abilities("selective_scan", BACKENDS, backend, u.dtype, asked)
    chosen = backends.operators_of(backends.choose(backend, u.device))
    if chosen == "native":
        from fused.ops.selective_scan import native

        return native.selective_scan(
            u, delta, A, B, C, D, z, delta_bias, softplus=softplus, initial_state=initial_state, reverse=reverse
        )
    if chosen == "mamba_ssm":
        return upstream.selective_scan(u, delta, A, B, C, D, z, delta_bias, softplus=softplus, reverse=reverse)
    return scan_torch(u, delta, A, B, C, D, z, delta_bias, softplus=softplus, initial_state=initial_state, reverse=reverse)


def bidirectional_scan(
    u: Pair,
    delta: Pair,
    A: Pair,
    B: Pair,
    C: Pair,
    D: tuple[Tensor | None, Tensor | None] = (None, None),
    z: Tokens | None = None,
    delta_bias: tuple[Tensor | None, Tensor | None] = (None, None),
    *,
    softplus: bool = True,
    backend: str = "auto",
) -> Tokens:
    """Two scans over the same tokens, the first of every pair from token 0 and the second from token L-1, and one gate:

        y = (scan(u[0], delta[0], ...) + scan(u[1], delta[1], ..., reverse=True)) * silu(z)

    Shapes, dtypes and errors as of `selective_scan`, without states. Backend "native" runs both in one kernel.

        >>> both = [(torch.randn(2, 63, 8), torch.randn(2, 63, 8)) for _ in range(2)]
        >>> A, mix = (-torch.rand(8, 4),) * 2, (torch.randn(2, 63, 4),) * 2
        >>> y = bidirectional_scan(*both, A, mix, mix)
    """
    pairs = [dict(zip(_PAIRED, one, strict=True)) for one in zip(u, delta, A, B, C, D, delta_bias, strict=True)]
    if len(pairs) != 2:
        raise ValueError(f"bidirectional_scan: u and all others but z must be pairs, got {len(pairs)} of each")
    for one in pairs:
        _check(**one, z=z, initial_state=None)
    for name, pair in (("u", u), ("A", A)):
        if len({(x.shape, x.dtype, x.device) for x in pair}) > 1:
            told = (f"{tuple(x.shape)} of {x.dtype} on {x.device}" for x in pair)
            raise ValueError(f"bidirectional_scan: {name} must be alike in both directions, got {' and '.join(told)}")
    chosen = backends.operators_of(backends.choose(backend, u[0].device))
    if chosen == "native" and all(x.dim() == 3 for x in (*B, *C)):
        from fused.ops.selective_scan import native

        backends.check_abilities("selective_scan", BACKENDS, "native", u[0].dtype, {})
        return native.bidirectional_scan(u, delta, A, B, C, D, z, delta_bias, softplus=softplus)
    options: dict[str, Any] = {"z": z, "softplus": softplus, "backend": backend}
    first, second = pairs
    return selective_scan(**first, **options)[0] + selective_scan(**second, **options, reverse=True)[0]


def scan_torch(
    u: Tokens,
    delta: Tokens,
    A: Float[Tensor, "E N"],
    B: Mixing,
    C: Mixing,
    D: Float[Tensor, " E"] | None = None,
    z: Tokens | None = None,
    delta_bias: Float[Tensor, " E"] | None = None,
    *,
    softplus: bool = True,
    initial_state: State | None = None,
    reverse: bool = False,
) -> tuple[Tokens, State]:
    """The scan in PyTorch operations, for any device: bounded scratch memory, repeatable bit for bit."""
    if torch.compiler.is_exporting():
        return traceable.selective_scan(u, delta, A, B, C, D, z, delta_bias, softplus, initial_state, reverse)
    keep = torch.is_grad_enabled()
    apply = Scan.apply
    if torch.compiler.is_compiling():
        from fused.uncompiled import scan as apply  # blocks of a loop, written into views of scratch memory: nothing to gain
    return apply(u, delta, A, B, C, D, z, delta_bias, initial_state, softplus, reverse, keep)


class Scan(torch.autograd.Function):
    """Saves its inputs and the state at every block's start; the backward recomputes the states block by block."""

    @staticmethod
    def forward(ctx, u, delta, A, B, C, D, z, delta_bias, initial_state, softplus, reverse, keep):
        ctx.set_materialize_grads(False)
        ctx.softplus, ctx.reverse = softplus, reverse
        with no_autocast(u.device):
            walk = _Walk(u, delta, A, B, C, D, z, delta_bias, softplus, reverse)
            y, state, starts = walk.forward(initial_state, keep and any(ctx.needs_input_grad))
        ctx.save_for_backward(u, delta, A, B, C, D, z, delta_bias, initial_state, starts)
        return y, state

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dstate):
        *inputs, initial_state, starts = ctx.saved_tensors
        with no_autocast(inputs[0].device):
            walk = _Walk(*(*inputs, ctx.softplus, ctx.reverse))
            grads = walk.backward(dy, dstate, starts)
        pairs = zip([*inputs, initial_state], grads, strict=True)
        return *(None if x is None or g is None else g.to(x.dtype) for x, g in pairs), None, None, None


class _Walk:
    """One scan: what has no states for whole clips, (b, L, E); what has them in the blocks of the recurrence."""

    def __init__(self, u, delta, A, B, C, D, z, delta_bias, softplus, reverse):
        self.u, self.delta, self.D, self.z, self.bias = u, delta, D, z, delta_bias
        self.softplus, self.reverse = softplus, reverse
        self.new = {"dtype": accumulation_dtype(u.dtype), "device": u.device}
        self.plain = (B.dim() == 3, C.dim() == 3)
        B, C = (x if x.dim() == 4 else x.unsqueeze(2) for x in (B, C))
        groups = max(B.shape[2], C.shape[2])
        self.B, self.C = (x.expand(-1, -1, groups, -1) for x in (B, C))
        self.channels = (groups, u.shape[2] // groups)
        self.A = self.rows(A)
        self.clips, self.pieces = plan(u.shape[0], u.shape[1], A.numel(), u.device.type != "cpu", reverse)

    def rows(self, x: Tensor) -> Tensor:
        """(..., E, N) -> (..., G, N, F) in the dtype of the computation, always a copy."""
        x = x.to(self.new["dtype"]).unflatten(-2, self.channels).transpose(-1, -2)
        return x.clone(memory_format=torch.contiguous_format)

    def recurrence(self, buffers: int) -> Recurrence:
        together = max((c.stop - c.start for c in self.clips), default=0)
        return Recurrence(self.A, self.reverse, together, self.pieces, buffers)

    def load(self, x: Tensor, clips: slice) -> Tensor:
        return x[clips].to(self.new["dtype"])

    def rates(self, clips: slice) -> tuple[Tensor, Tensor]:
        """delta before and after its softplus, (b, L, E)."""
        raw = self.load(self.delta, clips)
        raw = raw if self.bias is None else raw + self.bias.to(raw.dtype)
        return raw, clipwise(F.softplus, raw) if self.softplus else raw

    def forward(self, initial_state: Tensor | None, keep: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        """y, the final state, and if `keep` the state at every block's start."""
        y_out = torch.empty_like(self.u, memory_format=torch.contiguous_format)
        shape = (self.u.shape[0], *self.A.shape)
        final = torch.zeros(shape, **self.new) if initial_state is None else self.rows(initial_state)
        starts = torch.empty((len(self.pieces), *shape), **self.new) if keep else None
        run = self.recurrence(2)
        for clips in self.clips:
            u, B, C = (self.load(x, clips) for x in (self.u, self.B, self.C))
            _, delta = self.rates(clips)
            x, y, state = delta * u, torch.empty_like(u), final[clips]
            for i, piece in enumerate(self.pieces):
                if starts is not None:
                    starts[i, clips] = state
                w = run.cut(x, piece), run.cut(B, piece)
                _, _, after, state = run.forth(run.cut(delta, piece), w, state, piece)
                torch.sum(after.mul_(run.cut(C, piece)), -2, keepdim=True, out=run.cut(y, piece))
            if self.D is not None:
                y.addcmul_(self.D.to(y.dtype), u)
            if self.z is not None:
                y.mul_(clipwise(F.silu, self.load(self.z, clips)))
            y_out[clips] = y
            final[clips] = state
        return y_out, final.transpose(-1, -2).flatten(1, 2).contiguous(), starts

    def backward(self, dy_out: Tensor | None, dfinal: Tensor | None, starts: Tensor) -> list[Tensor | None]:
        """Gradients of u, delta, A, B, C, D, z, delta_bias, initial_state; with g_t the gradient of s_t,
        q_t = g_t a_t s_{t-1} is that of delta_t * A."""
        du_out, ddelta_out = torch.empty_like(self.u), torch.empty_like(self.delta)
        dz_out = None if self.z is None else torch.empty_like(self.z)
        dB, dC = torch.empty(self.B.shape, **self.new), torch.empty(self.C.shape, **self.new)
        dA, dD, dbias = torch.zeros_like(self.A), *torch.zeros((2, self.u.shape[2]), **self.new)
        shape = (self.u.shape[0], *self.A.shape)
        dstate = torch.zeros(shape, **self.new) if dfinal is None else self.rows(dfinal)
        run = self.recurrence(3)
        for clips in self.clips:
            u, B, C = (self.load(x, clips) for x in (self.u, self.B, self.C))
            raw, delta = self.rates(clips)
            x, gB, ddelta = delta * u, torch.empty_like(u), torch.empty_like(u)
            dy = dgated = torch.zeros_like(u) if dy_out is None else self.load(dy_out, clips)
            if self.z is not None:
                z, y = self.load(self.z, clips), torch.empty_like(u)
                gate = clipwise(torch.sigmoid, z)
                dy = dgated * gate * z
            carry = torch.ones_like(dstate[clips]), dstate[clips]
            for i, piece in reversed(list(enumerate(self.pieces))):
                d_, x_, B_, C_, dy_ = (run.cut(v, piece) for v in (delta, x, B, C, dy))
                a, before, after, _ = run.forth(d_, (x_, B_), starts[i, clips], piece)
                g = run.buffer(2, *a.shape)
                if self.z is not None:
                    torch.sum(torch.mul(after, C_, out=g), -2, keepdim=True, out=run.cut(y, piece))
                carry = run.back(a, torch.mul(C_, dy_, out=g), d_, carry, piece)
                q = a.mul_(g).mul_(before)
                torch.sum(after.mul_(dy_), -1, keepdim=True, out=run.cut(dC[clips], piece))
                free = after
                torch.sum(torch.mul(g, B_, out=free), -2, keepdim=True, out=run.cut(gB, piece))
                torch.sum(torch.mul(q, self.A, out=free), -2, keepdim=True, out=run.cut(ddelta, piece))
                torch.sum(g.mul_(x_), -1, keepdim=True, out=run.cut(dB[clips], piece))
                dA += q.mul_(d_).sum((0, 1, 2))
            ddelta.addcmul_(gB, u)
            if self.softplus:
                ddelta = clipwise(_softplus_backward, ddelta, raw)
            dbias += ddelta.sum((0, 1))
            du = gB.mul_(delta)
            if self.D is not None:
                D = self.D.to(du.dtype)
                du.addcmul_(D, dy)
                dD += (u * dy).sum((0, 1))
            if self.z is not None and dz_out is not None:
                y = y if self.D is None else y.addcmul_(D, u)
                dz_out[clips] = y * dgated * gate * (1 + z * (1 - gate))
            du_out[clips], ddelta_out[clips], dstate[clips] = du, ddelta, carry[0] * carry[1]
        dB, dC = (x.sum(2) if plain else x for x, plain in zip((dB, dC), self.plain, strict=True))
        dA, dstate = (x.transpose(-1, -2).flatten(-3, -2) for x in (dA, dstate))
        return [du_out, ddelta_out, dA, dB, dC, dD, dz_out, dbias, dstate]


def _softplus_backward(grad: Tensor, raw: Tensor) -> Tensor:
    return torch.ops.aten.softplus_backward(grad, raw, 1, 20)


def _check(u, delta, A, B, C, D, z, delta_bias, initial_state) -> None:
    op = "selective_scan"
    check_tensor(op, "u", u, "B L E", {}, None)
    sizes = dict(zip("BLE", u.shape, strict=True))
    check_tensor(op, "A", A, "E N", sizes, u.device)
    sizes["N"] = A.shape[1]
    if not sizes["N"]:
        raise ValueError(f"{op}: A must have at least one state a channel (N), got {tuple(A.shape)}")
    for name, value, letters in (("delta", delta, "B L E"), ("B", B, "B L N | B L G N"), ("C", C, "B L N | B L G N")):
        check_tensor(op, name, value, letters, sizes, u.device)
    for name, value, letters in (
        ("D", D, "E"),
        ("z", z, "B L E"),
        ("delta_bias", delta_bias, "E"),
        ("initial_state", initial_state, "B E N"),
    ):
        if value is not None:
            check_tensor(op, name, value, letters, sizes, u.device)
    groups = {name: x.shape[2] for name, x in (("B", B), ("C", C)) if x.dim() == 4}
    for name, count in groups.items():
        if count == 0 or u.shape[2] % count:
            raise ValueError(f"{op}: the groups of {name} must divide E={u.shape[2]}, got G={count}")
    if len(set(groups.values())) > 1:
        raise ValueError(f"{op}: B and C must have the same number of groups, got {groups}")
