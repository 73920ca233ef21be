"""Both directions of a mixer between its projections, on a CPU, segment by segment.

A segment of tokens goes from the convolution to the scan's output before the next one starts, so that what it needs stays in
the cache, and few operations are called. In a training this holds for the states; what has no states is computed for a group of
segments, because operations on the tokens of one are too short for several threads.

Kept for the backward are x, z, the sum y of the scans before the gate, the results of x_proj, and the state that enters every
segment. It computes the rest again, which also for short sequences takes no longer than to keep it.

Tensors of a segment are (T, K, b, E): T tokens, K = 2 directions, each in the order of its scan, b clips. W is the width of the
convolution. `Recurrence` runs the states.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fused.ops.mamba_inner.segment_views import rows, scan_order, span_of, steps, tokens
from fused.ops.mamba_inner.stacked_weights import DIRECTIONS, StackedWeights, stack, unstack
from fused.ops.selective_scan.recurrence import Carry, Recurrence, Segment, make_segments, sum_states
from fused.ops.shapes import DirectionWeights
from fused.runtime.autocast import autocast_dtype
from fused.runtime.elementwise import by_vectors, empty_vectors, silu_in_place
from fused.runtime.exporting import is_exporting
from fused.runtime.library import wants_gradients
from fused.runtime.memory import keep_freed_memory
from fused.runtime.scratch import Scratch

GROUP = 4
"""Segments of a training whose inputs are computed together: operations on tokens are then long enough for several threads."""


def takes(x: Tensor, directions: Sequence[DirectionWeights]) -> bool:
    """Return whether `both_directions_in_segments` can run: in float32 or float64, all alike, without autocast."""
    if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.float64):
        return False
    if is_exporting() or autocast_dtype(x.device) is not None:
        return False
    return all(w is None or w.dtype == x.dtype for direction in directions for w in direction)


def both_directions_in_segments(x: Tensor, directions: Sequence[DirectionWeights], z: Tensor) -> Tensor:
    """Return gated y (B, L, E) of x and z (B, L, E), as `both_directions_eager` does."""
    if torch.compiler.is_compiling():
        return _run_uncompiled(x, directions, z)
    weights = [w for pair in zip(*directions, strict=True) for w in pair]
    if wants_gradients(x, z, *weights):
        return _BothDirections.apply(x, z, *weights)
    with torch._C._AutoDispatchBelowAutograd():  # spares every operation a pass through autograd
        return _Pass(stack(weights), x.shape[0], x.shape[1], keep=False).forward(x, z)[0]


@torch._disable_dynamo
def _run_uncompiled(x: Tensor, directions: Sequence[DirectionWeights], z: Tensor) -> Tensor:
    """Run outside of the compiler's graph, as the scan does."""
    return both_directions_in_segments(x, directions, z)


class _BothDirections(torch.autograd.Function):
    """Autograd of `_Pass`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, z: Tensor, *weights: Tensor | None) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            stacked = stack(weights)
            out, y, kept = _Pass(stacked, x.shape[0], x.shape[1], keep=True).forward(x, z)
        ctx.save_for_backward(x, z, y, *stacked, *kept)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        x, z, y, *saved = ctx.saved_tensors
        number = len(StackedWeights._fields)
        with torch._C._AutoDispatchBelowAutograd():
            run = _Pass(StackedWeights(*saved[:number]), x.shape[0], x.shape[1], keep=True)
            return tuple(run.backward(dout, x, z, y, saved[number:]))


class _Inputs(NamedTuple):
    """The inputs of the recurrence and what leads to them: (T, K, b, E) but for `projected` and `padded`."""

    projected: Tensor  # dt, B and C, (K, T*b, R+2N)
    padded: Tensor  # x behind the W-1 tokens before it, (W-1+T, K, b, E)
    pre: Tensor  # the convolution before its SiLU; c itself in a forward
    c: Tensor
    raw: Tensor  # delta before its softplus
    delta: Tensor


class _Pass:
    """The forward or the backward of one call, over x and z (B, L, E)."""

    def __init__(self, weights: StackedWeights, batch: int, length: int, keep: bool) -> None:
        """With `keep` there is a backward."""
        keep_freed_memory()
        self.weights, self.length, self.beyond, self.keep = weights, length, len(weights.conv) - 1, keep
        self.N, self.R = weights.A.shape[3], weights.dt_proj.shape[2]
        self.options: dict[str, Any] = {"dtype": weights.A.dtype, "device": weights.A.device}
        self.clips, self.segments = make_segments(batch, length, weights.A.numel(), False)
        group = GROUP if keep else 1
        self.groups = [self.segments[i : i + group] for i in range(0, len(self.segments), group)]
        self.order = scan_order(weights.A, length)
        self.scratch = Scratch(weights.A)

    def forward(self, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Return gated y and y (B, L, E), one tensor unless something is kept, and two kept tensors for every group."""
        y_all, kept = self.total(x), []
        run = Recurrence(self.weights.A)
        for clips in self.clips:
            x_in, y_out = x[clips].transpose(0, 1), y_all[clips].transpose(0, 1)
            state = None
            for group in self.groups:
                whole = span_of(group)
                inputs = self.inputs(x_in, whole, None)
                if self.keep:
                    entering = torch.empty((len(group), DIRECTIONS, x_in.shape[1], *self.weights.A.shape[2:]), **self.options)
                    kept += [entering, inputs.projected]
                ys = self.scratch.tensor("y", tuple(inputs.c.shape))
                for i, ((delta, w, C), y) in enumerate(zip(self.operands(inputs, group), steps(ys, group), strict=True)):
                    if self.keep:
                        state = entering[i].zero_() if state is None else entering[i].copy_(state)
                    h, state = run.forward(delta, w, state, group[i])
                    sum_states(h, C, out=y)
                self.scatter(ys.addcmul_(self.weights.D, inputs.c), whole, y_out)
        gate = silu_in_place(self.copy(z))
        return torch.mul(y_all, gate, out=gate if self.keep else y_all), y_all, kept

    def backward(self, dout: Tensor, x: Tensor, z: Tensor, y: Tensor, kept: Sequence[Tensor]) -> Iterator[Tensor | None]:
        """Yield the gradients of x, z and all weights, for the gradient of the gated y and what the forward kept."""
        z = self.copy(z)
        dz = by_vectors(torch.ops.aten.silu_backward, torch.mul(dout, y, out=empty_vectors(y.shape, **self.options)), z)
        dy_all = silu_in_place(z).mul_(dout)
        dx_all, grads = self.total(x), None
        run, groups = Recurrence(self.weights.A), len(self.groups)
        for i, clips in enumerate(self.clips):
            x_in, dx, dy_in = (t[clips].transpose(0, 1) for t in (x, dx_all, dy_all))
            carry = None
            for j in reversed(range(groups)):
                group, (entering, projected) = self.groups[j], kept[2 * (i * groups + j) :][:2]
                whole = span_of(group)
                inputs = self.inputs(x_in, whole, projected)
                dy = self.scratch.tensor("dy", tuple(inputs.c.shape))
                self.gather(dy_in, whole, dy)
                *dscan, carry = self.scan_backward(run, group, inputs, dy, entering, carry)
                part = self.inputs_backward(inputs, dscan, dy, whole, dx)
                grads = part if grads is None else grads.add_(part)
        yield from (dx_all, dz)
        yield from unstack(self.weights, grads)

    def scan_backward(
        self, run: Recurrence, group: Sequence[Segment], inputs: _Inputs, dy: Tensor, entering: Tensor,
        carry: Carry | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Carry]:
        """Return the gradients of delta and of delta * c (T, K, b, E), of delta only the part through the decays, of B and C
        (T, K, b, N), of A (K, 1, N, E), and the `carry` of the group before.

        `entering` are the states (segments, K, b, 1, N, E) that enter the segments.
        """
        dA, (*shape, E) = None, inputs.c.shape
        sizes = {"ddelta": E, "dw": E, "dB": self.N, "dC": self.N}
        grads = tuple(self.scratch.tensor(name, (*shape, size)) for name, size in sizes.items())
        operands = list(zip(group, self.operands(inputs, group), steps(dy, group), entering.unbind(), strict=True))
        results = list(zip(*(steps(grad, group) for grad in grads), strict=True))
        for (segment, (delta, w, C), dy_, state), out in zip(reversed(operands), reversed(results), strict=True):
            run.forward(delta, w, state, segment)
            *_, dA_, carry = run.gradients(delta, w, C, dy_.unsqueeze(-2), carry, segment, out)
            dA = dA_ if dA is None else dA.add_(dA_)
        assert dA is not None and carry is not None
        ddelta, dw, dB, dC = grads
        return ddelta, dw, dB, dC, dA, carry

    def inputs(self, x: Tensor, segment: Segment, projected: Tensor | None) -> _Inputs:
        """Return a segment's inputs from x (L, b, E), with `projected` if that is known."""
        weights, (_, clips, E), T = self.weights, x.shape, segment.stop - segment.start
        shape = T, DIRECTIONS, clips, E
        padded = self.scratch.tensor("padded", (self.beyond + T, *shape[1:]))
        pre, raw, delta = (self.scratch.tensor(name, shape) for name in ("pre", "raw", "delta"))
        c = pre if projected is None else self.scratch.tensor("c", shape)
        self.gather(x, segment, padded, self.beyond)
        self.convolve(padded, pre)
        by_vectors(_silu, pre, c)
        if projected is None:
            projected = torch.bmm(rows(c), weights.x_proj.mT)
        dt = projected[..., : self.R]
        if clips == 1:
            torch.baddbmm(weights.dt_bias, dt, weights.dt_proj.mT, out=rows(raw))
        else:
            raw.copy_(tokens(torch.baddbmm(weights.dt_bias, dt, weights.dt_proj.mT), clips))
        by_vectors(_softplus, raw, delta)
        return _Inputs(projected, padded, pre, c, raw, delta)

    def operands(
        self, inputs: _Inputs, group: Sequence[Segment]
    ) -> Iterator[tuple[Tensor, tuple[Tensor, Tensor], Tensor]]:  # fmt: skip
        """Yield delta, (delta * c, B) and C of every segment as the recurrence takes them."""
        c, delta = inputs.c, inputs.delta
        w_all = torch.mul(delta, c, out=self.scratch.tensor("w", tuple(c.shape)))
        mixing = tokens(inputs.projected[..., self.R :], c.shape[2]).contiguous()
        for delta_, w, B_C in zip(*(steps(t, group) for t in (delta, w_all, mixing)), strict=True):
            B, C = B_C.unsqueeze(-1).chunk(2, -2)
            yield delta_.unsqueeze(-2), (w.unsqueeze(-2), B), C

    def inputs_backward(
        self, inputs: _Inputs, dscan: Sequence[Tensor], dy: Tensor, whole: Segment, dx: Tensor
    ) -> StackedWeights:  # fmt: skip
        """Add a group's part to dx (L, b, E) and return its part of the weights' gradients.

        `dscan` are the gradients that `scan_backward` returns; they and dy, the gradient of y, are overwritten.
        """
        weights, (projected, padded, pre, c, raw, delta) = self.weights, inputs
        ddelta, dw, dB, dC, dA = dscan
        draw_rows = rows(by_vectors(_softplus_backward, ddelta.addcmul_(dw, c), raw))
        dprojected = torch.cat((torch.bmm(draw_rows, weights.dt_proj), rows(dB), rows(dC)), dim=2)
        dc, product = dw.mul_(delta).addcmul_(weights.D, dy), self.scratch.tensor("product", (*draw_rows.shape,))
        dc += tokens(torch.bmm(dprojected, weights.x_proj, out=product), c.shape[2])
        dpre = by_vectors(_silu_backward, dc, pre)
        dconv, dconv_bias = self.convolve_backward(dpre, padded, whole, dx)
        return StackedWeights(
            dconv,
            dconv_bias,
            torch.bmm(dprojected.mT, rows(c)),
            torch.bmm(draw_rows.mT, projected[..., : self.R]),
            draw_rows.sum(1, keepdim=True),
            dA.unsqueeze(1),
            _sum(dy.mul_(c)),
        )

    def convolve(self, padded: Tensor, out: Tensor) -> None:
        """Write the convolution before its SiLU into `out` (T, K, b, E)."""
        bias, T, (first, *others) = self.weights.conv_bias, len(out), self.weights.conv.unbind()
        if bias is None:
            torch.mul(padded[:T], first, out=out)
        else:
            torch.addcmul(bias, padded[:T], first, out=out)
        for k, weight in enumerate(others, 1):
            out.addcmul_(padded[k : k + T], weight)

    def convolve_backward(self, dpre: Tensor, padded: Tensor, segment: Segment, dx: Tensor) -> tuple[Tensor, Tensor | None]:
        """Add the gradient of the convolution's input to dx (L, b, E); return those of its weights and bias."""
        T, dpadded = len(dpre), self.scratch.tensor("dpadded", tuple(padded.shape))
        first, *others = self.weights.conv.unbind()
        torch.mul(first, dpre, out=dpadded[:T])
        dpadded[T:].zero_()
        for k, weight in enumerate(others, 1):
            dpadded[k : k + T].addcmul_(weight, dpre)
        product = self.scratch.tensor("product", tuple(dpre.shape))  # of one weight at a time, which stays in the cache
        dconv = [_sum(torch.mul(padded[k : k + T], dpre, out=product)) for k in range(1 + self.beyond)]
        outside = max(0, self.beyond - segment.start)  # tokens before the first
        self.scatter(dpadded[outside:], segment, dx, self.beyond)
        return torch.stack(dconv), None if self.weights.conv_bias is None else _sum(dpre)

    def gather(self, x: Tensor, segment: Segment, out: Tensor, beyond: int = 0) -> None:
        """Write a segment of x (L, b, E), with the `beyond` tokens before it, or zeros, into `out` (beyond+T, K, b, E)."""
        start = max(0, segment.start - beyond)
        outside = out.shape[0] - (segment.stop - start)
        if outside:
            out[:outside].zero_()
        torch.index_select(x, 0, self.order[DIRECTIONS * start : DIRECTIONS * segment.stop], out=out[outside:].flatten(0, 1))

    def scatter(self, x: Tensor, segment: Segment, out: Tensor, beyond: int = 0) -> None:
        """Add a segment x (T, K, b, E), with up to `beyond` tokens before it, to `out` (L, b, E) of `total`."""
        forward, backward = x[:, 0], x[:, 1].flip(0)
        if len(self.groups) == 1:
            torch.add(forward, backward, out=out)
        else:
            start = max(0, segment.start - beyond)
            out[start : segment.stop] += forward
            out[self.length - segment.stop : self.length - start] += backward

    def total(self, like: Tensor) -> Tensor:
        """Return a tensor like `like` (B, L, E) for `scatter`: zeros, unless its first call writes all."""
        return torch.empty(like.shape, **self.options) if len(self.groups) == 1 else torch.zeros(like.shape, **self.options)

    def copy(self, x: Tensor) -> Tensor:
        """Return a copy of x in memory of `empty_vectors`."""
        return empty_vectors(x.shape, **self.options).copy_(x)


def _sum(x: Tensor) -> Tensor:
    """Return the sum (K, 1, E) over the tokens and clips of x (T, K, b, E)."""
    return x.sum((0, 2)).unsqueeze(1)


def _silu(x: Tensor, out: Tensor) -> Tensor:
    return torch.ops.aten.silu.out(x, out=out)


def _softplus(x: Tensor, out: Tensor) -> Tensor:
    return torch.ops.aten.softplus.out(x, 1, 20, out=out)


def _silu_backward(grad: Tensor, x: Tensor) -> Tensor:
    """Overwrite and return grad."""
    return torch.ops.aten.silu_backward.grad_input(grad, x, grad_input=grad)


def _softplus_backward(grad: Tensor, x: Tensor) -> Tensor:
    """Overwrite and return grad."""
    return torch.ops.aten.softplus_backward.grad_input(grad, x, 1, 20, grad_input=grad)
