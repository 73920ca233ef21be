"""The selective scan in PyTorch operations, for any device, over the blocked recurrence of `recurrence.py`."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from fused.ops.selective_scan import export
from fused.ops.selective_scan.recurrence import Recurrence, make_segments
from fused.ops.shapes import Mixing, State, Tokens
from fused.runtime.autocast import no_autocast
from fused.runtime.dtypes import accumulation_dtype
from fused.runtime.elementwise import clipwise
from fused.runtime.exporting import is_exporting


def selective_scan_eager(
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
    """Scan as `fused.selective_scan` says, in bounded scratch memory, repeatable bit for bit."""
    if is_exporting():
        return export.selective_scan(u, delta, A, B, C, D, z, delta_bias, softplus, initial_state, reverse)
    keep = torch.is_grad_enabled()
    run: Any = _run_uncompiled if torch.compiler.is_compiling() else SelectiveScan.apply
    return run(u, delta, A, B, C, D, z, delta_bias, initial_state, softplus, reverse, keep)


class SelectiveScan(torch.autograd.Function):
    """Autograd of the scan. It saves its inputs and the state that enters every segment; the backward recomputes the states."""

    @staticmethod
    def forward(
        ctx: Any, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
        delta_bias: Tensor | None, initial_state: Tensor | None, softplus: bool, reverse: bool, keep: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        ctx.set_materialize_grads(False)
        ctx.softplus, ctx.reverse = softplus, reverse
        with no_autocast(u.device):
            scan = _Scan(u, delta, A, B, C, D, z, delta_bias, softplus, reverse)
            y, state, initial_states = scan.forward(initial_state, keep and any(ctx.needs_input_grad))
        ctx.save_for_backward(u, delta, A, B, C, D, z, delta_bias, initial_state, initial_states)
        return y, state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dstate: Tensor | None) -> tuple[Tensor | None, ...]:
        *inputs, initial_state, initial_states = ctx.saved_tensors
        with no_autocast(inputs[0].device):
            scan = _Scan(*(*inputs, ctx.softplus, ctx.reverse))
            grads = scan.backward(dy, dstate, initial_states)
        pairs = zip([*inputs, initial_state], grads, strict=True)
        return *(None if x is None or g is None else g.to(x.dtype) for x, g in pairs), None, None, None


class _Scan:
    """A scan. Tensors without states are held for whole clips, (b, L, E), those with states for a segment at a time."""

    def __init__(
        self, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
        delta_bias: Tensor | None, softplus: bool, reverse: bool,
    ) -> None:  # fmt: skip
        self.u, self.delta, self.D, self.z, self.bias = u, delta, D, z, delta_bias
        self.softplus, self.reverse = softplus, reverse
        self.tensor_options: dict[str, Any] = {"dtype": accumulation_dtype(u.dtype), "device": u.device}
        self.without_groups = (B.dim() == 3, C.dim() == 3)
        B, C = (x if x.dim() == 4 else x.unsqueeze(2) for x in (B, C))
        groups = max(B.shape[2], C.shape[2])
        self.B, self.C = (x.expand(-1, -1, groups, -1) for x in (B, C))
        self.channels = (groups, u.shape[2] // groups)
        self.A = self.rows(A)
        self.clips, self.segments = make_segments(u.shape[0], u.shape[1], A.numel(), u.device.type != "cpu", reverse)

    def rows(self, x: Tensor) -> Tensor:
        """Return (..., E, N) as (..., G, N, F) in the dtype of the computation, always a copy."""
        x = x.to(self.tensor_options["dtype"]).unflatten(-2, self.channels).transpose(-1, -2)
        return x.clone(memory_format=torch.contiguous_format)

    def recurrence(self, buffers: int) -> Recurrence:
        clips = max((c.stop - c.start for c in self.clips), default=0)
        return Recurrence(self.A, self.reverse, clips, self.segments, buffers)

    def load(self, x: Tensor, clips: slice) -> Tensor:
        return x[clips].to(self.tensor_options["dtype"])

    def deltas(self, clips: slice) -> tuple[Tensor, Tensor]:
        """Return delta before and after its softplus, (b, L, E)."""
        raw = self.load(self.delta, clips)
        raw = raw if self.bias is None else raw + self.bias.to(raw.dtype)
        return raw, clipwise(F.softplus, raw) if self.softplus else raw

    def forward(self, initial_state: Tensor | None, keep: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return y (B, L, E), the final state (B, E, N), and if `keep` the states entering segments, (segments, B, G, N, F)."""
        y_out = torch.empty_like(self.u, memory_format=torch.contiguous_format)
        shape = (self.u.shape[0], *self.A.shape)
        final = torch.zeros(shape, **self.tensor_options) if initial_state is None else self.rows(initial_state)
        initial_states = torch.empty((len(self.segments), *shape), **self.tensor_options) if keep else None
        run = self.recurrence(2)
        for clips in self.clips:
            u, B, C = (self.load(x, clips) for x in (self.u, self.B, self.C))
            _, delta = self.deltas(clips)
            x, y, state = delta * u, torch.empty_like(u), final[clips]
            for i, segment in enumerate(self.segments):
                if initial_states is not None:
                    initial_states[i, clips] = state
                w = run.view(x, segment), run.view(B, segment)
                _, _, after, state = run.forward(run.view(delta, segment), w, state, segment)
                torch.sum(after.mul_(run.view(C, segment)), -2, keepdim=True, out=run.view(y, segment))
            if self.D is not None:
                y.addcmul_(self.D.to(y.dtype), u)
            if self.z is not None:
                y.mul_(clipwise(F.silu, self.load(self.z, clips)))
            y_out[clips] = y
            final[clips] = state
        return y_out, final.transpose(-1, -2).flatten(1, 2).contiguous(), initial_states

    def backward(self, dy_out: Tensor | None, dfinal: Tensor | None, initial_states: Tensor) -> list[Tensor | None]:
        """Return the gradients of u, delta, A, B, C, D, z, delta_bias and initial_state.

        With g_t the gradient of h_t, q_t = g_t a_t h_{t-1} is the gradient of delta_t * A.
        """
        du_out, ddelta_out = torch.empty_like(self.u), torch.empty_like(self.delta)
        dz_out = None if self.z is None else torch.empty_like(self.z)
        dB, dC = torch.empty(self.B.shape, **self.tensor_options), torch.empty(self.C.shape, **self.tensor_options)
        dA, dD, dbias = torch.zeros_like(self.A), *torch.zeros((2, self.u.shape[2]), **self.tensor_options)
        shape = (self.u.shape[0], *self.A.shape)
        dstate = torch.zeros(shape, **self.tensor_options) if dfinal is None else self.rows(dfinal)
        run = self.recurrence(3)
        for clips in self.clips:
            u, B, C = (self.load(x, clips) for x in (self.u, self.B, self.C))
            raw, delta = self.deltas(clips)
            x, gB, ddelta = delta * u, torch.empty_like(u), torch.empty_like(u)
            dy = dgated = torch.zeros_like(u) if dy_out is None else self.load(dy_out, clips)
            if self.z is not None:
                z, y = self.load(self.z, clips), torch.empty_like(u)
                gate = clipwise(torch.sigmoid, z)
                dy = dgated * gate * z
            carry = torch.ones_like(dstate[clips]), dstate[clips]
            for i, segment in reversed(list(enumerate(self.segments))):
                d_, x_, B_, C_, dy_ = (run.view(v, segment) for v in (delta, x, B, C, dy))
                a, before, after, _ = run.forward(d_, (x_, B_), initial_states[i, clips], segment)
                g = run.buffer(2, *a.shape)
                if self.z is not None:
                    torch.sum(torch.mul(after, C_, out=g), -2, keepdim=True, out=run.view(y, segment))
                carry = run.backward(a, torch.mul(C_, dy_, out=g), d_, carry, segment)
                q = a.mul_(g).mul_(before)
                torch.sum(after.mul_(dy_), -1, keepdim=True, out=run.view(dC[clips], segment))
                scratch = after
                torch.sum(torch.mul(g, B_, out=scratch), -2, keepdim=True, out=run.view(gB, segment))
                torch.sum(torch.mul(q, self.A, out=scratch), -2, keepdim=True, out=run.view(ddelta, segment))
                torch.sum(g.mul_(x_), -1, keepdim=True, out=run.view(dB[clips], segment))
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
        dB, dC = (x.sum(2) if squeezed else x for x, squeezed in zip((dB, dC), self.without_groups, strict=True))
        dA, dstate = (x.transpose(-1, -2).flatten(-3, -2) for x in (dA, dstate))
        return [du_out, ddelta_out, dA, dB, dC, dD, dz_out, dbias, dstate]


def _softplus_backward(grad: Tensor, raw: Tensor) -> Tensor:
    return torch.ops.aten.softplus_backward(grad, raw, 1, 20)


@torch._disable_dynamo
def _run_uncompiled(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Scan outside of the compiler's graph: it gains nothing in a loop that writes into views of scratch memory."""
    return SelectiveScan.apply(*arguments)
