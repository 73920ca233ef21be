"""The selective scan in PyTorch operations, for any device, over the blocked recurrence of `recurrence.py`.

One scan, or two of opposite directions under one gate, are K directions in front of all other dimensions: (K, B, L, E).
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from fused.ops.selective_scan import export
from fused.ops.selective_scan.recurrence import Recurrence, Segment, make_segments, sum_states
from fused.ops.shapes import Mixing, State, Tokens
from fused.runtime.autocast import no_autocast
from fused.runtime.dtypes import accumulation_dtype
from fused.runtime.elementwise import by_vectors, empty_vectors, silu_in_place
from fused.runtime.exporting import is_exporting
from fused.runtime.library import wants_gradients

BOTH = (False, True)
"""The directions of a bidirectional scan: whether they scan in reverse."""


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
    D, delta_bias = (None if x is None else x.unsqueeze(0) for x in (D, delta_bias))
    directions = (x.unsqueeze(0) for x in (u, delta, A, B, C))
    return _run(*directions, D, z, delta_bias, initial_state, softplus, (reverse,), reverse)


def scan_both_directions(
    u: Float[Tensor, "2 B L E"],
    delta: Float[Tensor, "2 B L E"],
    A: Float[Tensor, "2 E N"],
    B: Float[Tensor, "2 B L *G N"],
    C: Float[Tensor, "2 B L *G N"],
    D: Float[Tensor, "2 E"] | None = None,
    z: Tokens | None = None,
    delta_bias: Float[Tensor, "2 E"] | None = None,
    *,
    softplus: bool = True,
) -> Tokens:
    """Scan as `fused.bidirectional_scan` says. A step takes both directions, so that there are half as many steps.

    Tokens of the backward direction, [1] of u, delta, B and C, are in the order of its scan, from token L-1 to 0. z and y are
    in the order of the tokens.
    """
    if is_exporting():
        forward, backward = (
            export.selective_scan(
                u[i], delta[i], A[i], B[i], C[i], None if D is None else D[i], None if z is None else z.flip(1) if i else z,
                None if delta_bias is None else delta_bias[i], softplus, None, False,
            )[0] for i in range(2)
        )  # fmt: skip
        return forward + backward.flip(1)
    return _run(u, delta, A, B, C, D, z, delta_bias, None, softplus, BOTH, False)[0]


def _run(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Return y (B, L, E) and the final state (B, E, N) of the first direction, for the arguments of `_Scan`."""
    if torch.compiler.is_compiling():
        return _apply_uncompiled(*arguments)
    if wants_gradients(*arguments):
        return SelectiveScan.apply(*arguments)
    with no_autocast(arguments[0].device):
        return _Scan(*arguments).forward(keep=False)[:2]


class SelectiveScan(torch.autograd.Function):
    """Autograd of the scan. It saves its inputs and the state that enters every segment; the backward recomputes the states."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        *tensors, ctx.softplus, ctx.reverse, ctx.flip_inputs = arguments
        with no_autocast(tensors[0].device):
            y, state, initial_states = _Scan(*arguments).forward(keep=any(ctx.needs_input_grad))
        ctx.save_for_backward(*tensors, initial_states)
        return y, state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dstate: Tensor | None) -> tuple[Tensor | None, ...]:
        *tensors, initial_states = ctx.saved_tensors
        with no_autocast(tensors[0].device):
            scan = _Scan(*(*tensors, ctx.softplus, ctx.reverse, ctx.flip_inputs))
            grads = scan.backward(dy, dstate, initial_states)
        pairs = zip(tensors, grads, strict=True)
        return *(None if x is None or g is None else g.to(x.dtype) for x, g in pairs), None, None, None


class _Scan:
    """A scan of K directions. Tensors without states are held for whole clips, those with states for a segment at a time."""

    def __init__(
        self, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
        delta_bias: Tensor | None, initial_state: Tensor | None, softplus: bool, reverse: tuple[bool, ...], flip_inputs: bool,
    ) -> None:  # fmt: skip
        """Take u and delta (K, B, L, E), A (K, E, N), B and C (K, B, L, N) or (K, B, L, G, N), D and delta_bias (K, E), z
        (B, L, E), and initial_state (B, E, N), which only one direction can have.

        `reverse` says of every direction whether it starts at token L-1. With `flip_inputs` the tensors with K and L are in the
        order of the tokens, else in that of the scan. z is in the order of the tokens.
        """
        self.u, self.delta, self.z, self.initial_state = u, delta, z, initial_state
        self.softplus, self.reverse, self.flip_inputs = softplus, reverse, flip_inputs
        self.options: dict[str, Any] = {"dtype": accumulation_dtype(u.dtype), "device": u.device}
        self.without_groups = (B.dim() == 4, C.dim() == 4)
        B, C = (x if x.dim() == 5 else x.unsqueeze(3) for x in (B, C))
        groups = max(B.shape[3], C.shape[3])
        self.B, self.C = (x.expand(-1, -1, -1, groups, -1) for x in (B, C))
        self.channels = (groups, u.shape[3] // groups)
        self.A = self.rows(A).unsqueeze(1)
        self.D, self.bias = (None if x is None else x.to(self.A.dtype)[:, None, None] for x in (D, delta_bias))
        self.clips, self.segments = make_segments(u.shape[1], u.shape[2], A.numel(), u.device.type != "cpu")

    def rows(self, x: Tensor) -> Tensor:
        """Return (..., E, N) as (..., G, N, F) in the dtype of the computation, always a copy."""
        x = x.to(self.options["dtype"]).unflatten(-2, self.channels).transpose(-1, -2)
        return x.clone(memory_format=torch.contiguous_format)

    def states(self, x: Tensor | None) -> Tensor:
        """Return x (B, E, N), or zeros, as states (K, B, G, N, F)."""
        if x is not None:
            return self.rows(x).unsqueeze(0)
        return torch.zeros(len(self.u), self.u.shape[1], *self.A.shape[2:], **self.options)

    def span(self, segment: Segment, reverse: bool) -> slice:
        """Return the tokens of a segment, of whose scan the direction is `reverse`."""
        length = self.u.shape[2]
        return slice(length - segment.stop, length - segment.start) if reverse else slice(segment.start, segment.stop)

    def load(self, x: Tensor, clips: slice, segment: Segment) -> Tensor:
        """Return a segment (K, b, T, ...) of an input (K, B, L, ...), in the dtype of the computation."""
        x = x[:, clips, self.span(segment, self.flip_inputs)].to(self.options["dtype"])
        return x.flip(2) if self.flip_inputs else x

    def store(self, out: Tensor, clips: slice, segment: Segment, grad: Tensor) -> None:
        """Write the gradient (K, b, T, ...) of a segment of an input into `out` (K, B, L, ...)."""
        out[:, clips, self.span(segment, self.flip_inputs)] = grad.flip(2) if self.flip_inputs else grad

    def take(self, x: Tensor, segment: Segment) -> Tensor:
        """Return a segment (K, b, T, E) of x (b, L, E) as every direction meets it."""
        parts = [x[:, self.span(segment, r)] for r in self.reverse]
        parts = [part.flip(1) if r else part for part, r in zip(parts, self.reverse, strict=True)]
        return torch.stack(parts) if len(parts) > 1 else parts[0].unsqueeze(0)

    def add(self, y: Tensor, segment: Segment, part: Tensor) -> None:
        """Add the segment (K, b, T, E) of every direction to y (b, L, E)."""
        for x, r in zip(part, self.reverse, strict=True):
            y[:, self.span(segment, r)] += x.flip(1) if r else x

    def deltas(self, clips: slice, segment: Segment) -> tuple[Tensor, Tensor]:
        """Return delta before and after its softplus, (K, b, T, E)."""
        delta = self.load(self.delta, clips, segment)
        raw = empty_vectors(delta.shape, **self.options)
        if self.bias is None:
            raw.copy_(delta)
        else:
            torch.add(delta, self.bias, out=raw)
        return raw, by_vectors(F.softplus, raw) if self.softplus else raw

    def load_gate(self, clips: slice) -> Tensor | None:
        """Return z (b, L, E)."""
        return None if self.z is None else empty_vectors(self.z[clips].shape, **self.options).copy_(self.z[clips])

    def forward(self, keep: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return y (B, L, E), the final state (B, E, N), and the states entering segments, (segments, K, B, G, N, F).

        The last is None unless `keep`.
        """
        y_out, final = torch.zeros(self.u.shape[1:], **self.options), self.states(self.initial_state)
        initial_states = torch.empty((len(self.segments), *final.shape), **self.options) if keep else None
        run = Recurrence(self.A)
        for clips in self.clips:
            state = final[:, clips]
            for i, segment in enumerate(self.segments):
                if initial_states is not None:
                    initial_states[i, :, clips] = state
                u, B, C = (self.load(x, clips, segment) for x in (self.u, self.B, self.C))
                _, delta = self.deltas(clips, segment)
                d_, x_, B_, C_ = (run.view(v, segment) for v in (delta, delta * u, B, C))
                after, leaving = run.forward(d_, (x_, B_), state, segment)
                state.copy_(leaving)
                y = run.tokens(sum_states(after, C_, scratch=after)).flatten(3)
                self.add(y_out[clips], segment, y if self.D is None else y.addcmul_(self.D, u))
            if (z := self.load_gate(clips)) is not None:
                y_out[clips] *= silu_in_place(z)
        return y_out.to(self.u.dtype), final[0].transpose(-1, -2).flatten(1, 2).contiguous(), initial_states

    def backward(self, dy_out: Tensor | None, dfinal: Tensor | None, initial_states: Tensor) -> list[Tensor | None]:
        """Return the gradients of u, delta, A, B, C, D, z, delta_bias and initial_state."""
        du_out, ddelta_out = torch.empty_like(self.u), torch.empty_like(self.delta)
        dz_out = None if self.z is None else torch.empty_like(self.z)
        dB_out, dC_out = torch.empty(self.B.shape, **self.options), torch.empty(self.C.shape, **self.options)
        dA, dD, dbias = torch.zeros_like(self.A[:, 0]), *torch.zeros((2, len(self.u), self.u.shape[3]), **self.options)
        dstate = self.states(dfinal)
        run = Recurrence(self.A)
        for clips in self.clips:
            if dy_out is None:
                dgated = torch.zeros(self.u[0, clips].shape, **self.options)
            else:
                dgated = dy_out[clips].to(self.A.dtype)
            if (z := self.load_gate(clips)) is not None:
                dy_all, y_all = by_vectors(F.silu, z).mul_(dgated), torch.zeros_like(z)
            carry = torch.ones_like(dstate[:, clips]), dstate[:, clips]
            for i, segment in reversed(list(enumerate(self.segments))):
                u, B, C = (self.load(x, clips, segment) for x in (self.u, self.B, self.C))
                raw, delta = self.deltas(clips, segment)
                dy = self.take(dgated if z is None else dy_all, segment)
                d_, x_, B_, C_, dy_ = (run.view(v, segment) for v in (delta, delta * u, B, C, dy))
                after, _ = run.forward(d_, (x_, B_), initial_states[i, :, clips], segment)
                if z is not None:
                    y = run.tokens(sum_states(after, C_, scratch=run.scratch.tensor("adjoints", tuple(after.shape)))).flatten(3)
                    self.add(y_all, segment, y if self.D is None else y.addcmul_(self.D, u))
                *grads, dA_, carry = run.gradients(d_, (x_, B_), C_, dy_, carry, segment)
                ddelta, gB, dB, dC = (run.tokens(x) for x in grads)
                dA += dA_
                ddelta, gB = empty_vectors(u.shape, **self.options).copy_(ddelta.flatten(3)), gB.flatten(3)
                ddelta.addcmul_(gB, u)
                if self.softplus:
                    ddelta = by_vectors(_softplus_backward, ddelta, raw)
                dbias += ddelta.sum((1, 2))
                du = gB.mul_(delta)
                if self.D is not None:
                    du.addcmul_(self.D, dy)
                    dD += (u * dy).sum((1, 2))
                for out, grad in ((du_out, du), (ddelta_out, ddelta), (dB_out, dB), (dC_out, dC)):
                    self.store(out, clips, segment, grad)
            dstate[:, clips] = carry[0] * carry[1]
            if z is not None and dz_out is not None:
                dy_all = torch.mul(y_all, dgated, out=dy_all)
                dz_out[clips] = by_vectors(torch.ops.aten.silu_backward, dy_all, z)
        dB_out, dC_out = (x.sum(3) if s else x for x, s in zip((dB_out, dC_out), self.without_groups, strict=True))
        dA, dstate = (x.transpose(-1, -2).flatten(-3, -2) for x in (dA, dstate[0]))
        return [du_out, ddelta_out, dA, dB_out, dC_out, dD, dz_out, dbias, dstate]


def _softplus_backward(grad: Tensor, raw: Tensor) -> Tensor:
    return torch.ops.aten.softplus_backward(grad, raw, 1, 20)


@torch._disable_dynamo
def _apply_uncompiled(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Scan outside of the compiler's graph: it gains nothing in a loop that writes into views of scratch memory."""
    return SelectiveScan.apply(*arguments)
