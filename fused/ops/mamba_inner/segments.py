"""Both directions of a mixer between its projections, on a CPU, segment by segment.

A segment of tokens goes from the convolution to the scan's output before the next one starts, so that what it needs stays in
the cache, and few operations are called. In a training this holds for the states; what has no states is computed for a group of
segments, because operations on the tokens of one are too short for several threads.

Kept for the backward are x, z, the sum y of the scans before the gate, the results of x_proj, and the state that enters every
segment. It computes the rest again, except for short sequences, of which everything is kept.

Tensors of a segment are (K, T, b, E): K = 2 directions, each in the order of its scan, T tokens, b clips. W is the width of the
convolution. `Recurrence` runs the states.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fused.ops.mamba_inner.segment_views import join, segment_of, span_of, steps, tokens, unflip
from fused.ops.mamba_inner.stacked_weights import DIRECTIONS, StackedWeights, stack, unstack
from fused.ops.selective_scan.recurrence import Carry, Recurrence, Segment, make_segments, sum_states
from fused.ops.shapes import DirectionWeights
from fused.runtime.autocast import autocast_dtype
from fused.runtime.elementwise import by_vectors, empty_vectors, silu_in_place
from fused.runtime.exporting import is_exporting
from fused.runtime.library import wants_gradients
from fused.runtime.memory import keep_freed_memory

KEPT_STATES = 2**19
"""States (clips x tokens x directions x channels x states) up to which everything is kept, which is 5 MiB a layer."""
GROUP = 8
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
    """The inputs of a segment's recurrence and what leads to them: (K, T, b, E) but for `projected` and `padded`."""

    projected: Tensor  # dt, B and C, (K, T*b, R+2N)
    padded: Tensor  # x behind the W-1 tokens before it, (K, W-1+T, b, E)
    pre: Tensor  # the convolution before its SiLU; c itself if it was not to be kept
    c: Tensor
    raw: Tensor  # delta before its softplus
    delta: Tensor


class _Pass:
    """The forward or the backward of one call, over x and z (B, L, E)."""

    def __init__(self, weights: StackedWeights, batch: int, length: int, keep: bool) -> None:
        """With `keep` there is a backward, which needs more scratch memory: segments are half as long."""
        keep_freed_memory()
        self.weights, self.length, self.beyond, self.keep = weights, length, len(weights.conv) - 1, keep
        self.N, self.R = weights.A.shape[3], weights.dt_proj.shape[2]
        self.options: dict[str, Any] = {"dtype": weights.A.dtype, "device": weights.A.device}
        self.clips, self.segments = make_segments(batch, length, weights.A.numel(), False, 2 if keep else 1)
        group = GROUP if keep else 1
        self.groups = [self.segments[i : i + group] for i in range(0, len(self.segments), group)]
        few = len(self.clips) == len(self.segments) == 1 and batch * length * weights.A.numel() <= KEPT_STATES
        self.keep_all = keep and few

    def recurrence(self, buffers: int, keep: bool) -> Recurrence:
        clips = max((c.stop - c.start for c in self.clips), default=0)
        return Recurrence(self.weights.A, clips, self.segments, buffers, keep)

    def initial_state(self, clips: slice) -> Tensor:
        """Return zeros (K, b, 1, N, E)."""
        return torch.zeros((DIRECTIONS, clips.stop - clips.start, *self.weights.A.shape[2:]), **self.options)

    def forward(self, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Return gated y and y (B, L, E), one tensor unless something is kept, and as many kept tensors for every group."""
        y_all, kept = torch.zeros(x.shape, **self.options), []
        run = self.recurrence(2, self.keep_all)
        for clips in self.clips:
            x_in, y_out = x[clips].transpose(0, 1), y_all[clips].transpose(0, 1)
            state = self.initial_state(clips)
            for group in self.groups:
                whole, entering = span_of(group), []
                inputs = self.inputs(x_in, whole, None, self.keep_all)
                streams, ys = self.streams(inputs), []
                for segment in group:
                    entering.append(state)
                    delta, w, C = self.operands(streams, segment, whole)
                    a, _, h, state = run.forward(delta, w, state, segment)
                    y = tokens(sum_states(h, C, scratch=torch.empty_like(h) if self.keep_all else h))
                    ys.append(y.addcmul_(self.weights.D, segment_of(inputs.c, segment, whole)))
                if self.keep_all:
                    kept += [*entering, *inputs, a, run.states(a)]
                elif self.keep:
                    kept += [torch.stack(entering), inputs.projected]
                for part, place in zip(unflip(join(ys)), self.spans(whole), strict=True):
                    y_out[place] += part
        gate = silu_in_place(self.copy(z))
        return torch.mul(y_all, gate, out=gate if self.keep else y_all), y_all, kept

    def backward(self, dout: Tensor, x: Tensor, z: Tensor, y: Tensor, kept: Sequence[Tensor]) -> Iterator[Tensor | None]:
        """Yield the gradients of x, z and all weights, for the gradient of the gated y and what the forward kept."""
        z = self.copy(z)
        dz = by_vectors(torch.ops.aten.silu_backward, torch.mul(dout, y, out=empty_vectors(y.shape, **self.options)), z)
        dy_all = silu_in_place(z).mul_(dout)
        dx_all, grads = torch.zeros(x.shape, **self.options), None
        run, groups = self.recurrence(3, False), len(self.groups)
        number = len(kept) // max(1, len(self.clips) * groups)
        for i, clips in enumerate(self.clips):
            x_in, dx, dy_in = (t[clips].transpose(0, 1) for t in (x, dx_all, dy_all))
            carry = self.initial_state(clips), self.initial_state(clips)
            for j in reversed(range(groups)):
                group, (entering, *rest) = self.groups[j], kept[(i * groups + j) * number :][:number]
                whole = span_of(group)
                inputs = _Inputs(*rest[:-2]) if self.keep_all else self.inputs(x_in, whole, rest[0], True)
                states = (rest[-2], rest[-1][:-1], rest[-1][1:]) if self.keep_all else entering.unbind()
                dy = self.gather(dy_in, whole)
                *dscan, carry = self.scan_backward(run, group, inputs, dy, states, carry)
                part = self.inputs_backward(inputs, dscan, dy, whole, dx)
                grads = part if grads is None else grads.add_(part)
        yield from (dx_all, dz)
        yield from unstack(self.weights, grads)

    def scan_backward(
        self, run: Recurrence, group: Sequence[Segment], inputs: _Inputs, dy: Tensor, kept: Sequence[Tensor], carry: Carry
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Carry]:
        """Return the gradients of delta and of c (K, T, b, E), of the latter only the part through delta * c, of `projected`,
        without values for dt, of A (K, 1, N, E), and the `carry` of the group before.

        `kept` are the states that enter the segments, or for a single one what `Recurrence.gradients` takes.
        """
        c, delta, whole, dA = inputs.c, inputs.delta, span_of(group), None
        ddelta, dc = (empty_vectors(c.shape, **self.options) for _ in range(2))
        dprojected = torch.empty_like(inputs.projected)
        rows = dprojected.view(*c.shape[:3], -1)
        streams = self.streams(inputs)
        results = c, delta, ddelta, dc, rows[..., self.R : -self.N], rows[..., -self.N :]
        for i in reversed(range(len(group))):
            segment = group[i]
            delta_, w, C = self.operands(streams, segment, whole)
            states = kept if self.keep_all else run.forward(delta_, w, kept[i], segment)[:3]
            dy_ = steps(dy, segment, whole).unsqueeze(-2)
            *parts, dA_, carry = run.gradients((states[0], states[1], states[2]), delta_, w, C, dy_, carry, segment)
            c_, delta_, ddelta_, dc_, dB_, dC_ = (segment_of(t, segment, whole) for t in results)
            from_delta, from_w, from_B, from_C = (tokens(part) for part in parts)
            torch.addcmul(from_delta, from_w, c_, out=ddelta_)
            torch.mul(from_w, delta_, out=dc_)
            dB_.copy_(from_B)
            dC_.copy_(from_C)
            dA = dA_ if dA is None else dA.add_(dA_)
        assert dA is not None
        return ddelta, dc, dprojected, dA, carry

    def inputs(self, x: Tensor, segment: Segment, projected: Tensor | None, keep_pre: bool) -> _Inputs:
        """Return a segment's inputs from x (L, b, E), with `projected` if that is known."""
        weights = self.weights
        padded = self.gather(x, segment, self.beyond)
        pre = self.convolve(padded)
        c = by_vectors(F.silu, pre) if keep_pre else silu_in_place(pre)
        if projected is None:
            projected = torch.bmm(c.flatten(1, 2), weights.x_proj.mT)
        raw = empty_vectors(c.shape, **self.options)
        torch.baddbmm(weights.dt_bias, projected[..., : self.R], weights.dt_proj.mT, out=raw.flatten(1, 2))
        return _Inputs(projected, padded, pre, c, raw, by_vectors(F.softplus, raw))

    def streams(self, inputs: _Inputs) -> tuple[Tensor, Tensor, Tensor]:
        """Return delta and delta * c (K, T, b, E), and dt, B and C (K, T, b, R+2N)."""
        c, delta = inputs.c, inputs.delta
        return delta, delta * c, inputs.projected.view(*c.shape[:3], -1)

    def operands(
        self, streams: tuple[Tensor, Tensor, Tensor], segment: Segment, whole: Segment
    ) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]:
        """Return delta, (delta * c, B) and C of a segment as the recurrence takes them."""
        mixing = steps(streams[2], segment, whole).unsqueeze(-1)
        B, C = mixing[..., self.R : -self.N, :], mixing[..., -self.N :, :]
        delta, w = (steps(t, segment, whole).unsqueeze(-2) for t in streams[:2])
        return delta, (w, B), C

    def inputs_backward(
        self, inputs: _Inputs, dscan: Sequence[Tensor], dy: Tensor, whole: Segment, dx: Tensor
    ) -> StackedWeights:  # fmt: skip
        """Add a group's part to dx (L, b, E) and return its part of the weights' gradients.

        `dscan` are the gradients that `scan_backward` returns; they and dy, the gradient of y, are overwritten.
        """
        weights, (projected, padded, pre, c, raw, _) = self.weights, inputs
        ddelta, dc, dprojected, dA = dscan
        draw = by_vectors(_softplus_backward, ddelta, raw)
        dc.addcmul_(weights.D, dy)
        draw_rows, dc_rows, c_rows = (t.flatten(1, 2) for t in (draw, dc, c))
        dprojected[..., : self.R] = torch.bmm(draw_rows, weights.dt_proj)
        dc_rows.baddbmm_(dprojected, weights.x_proj)
        dconv, dconv_bias = self.convolve_backward(by_vectors(torch.ops.aten.silu_backward, dc, pre), padded, whole, dx)
        return StackedWeights(
            dconv,
            dconv_bias,
            torch.bmm(dprojected.mT, c_rows),
            torch.bmm(draw_rows.mT, projected[..., : self.R]),
            draw_rows.sum(1, keepdim=True),
            dA.unsqueeze(1),
            dy.mul_(c).sum((1, 2), keepdim=True),
        )

    def convolve(self, padded: Tensor) -> Tensor:
        """Return the convolution (K, T, b, E) before its SiLU, in memory of `empty_vectors`."""
        rows, bias, T = self.weights.conv, self.weights.conv_bias, padded.shape[1] - self.beyond
        y = empty_vectors((DIRECTIONS, T, *padded.shape[2:]), **self.options)
        if bias is None:
            torch.mul(padded[:, :T], rows[0], out=y)
        else:
            torch.addcmul(bias, padded[:, :T], rows[0], out=y)
        for k in range(1, len(rows)):
            y.addcmul_(padded[:, k : k + T], rows[k])
        return y

    def convolve_backward(self, dpre: Tensor, padded: Tensor, segment: Segment, dx: Tensor) -> tuple[Tensor, Tensor | None]:
        """Add the gradient of the convolution's input to dx (L, b, E); return those of its weights and bias."""
        T, dpadded = dpre.shape[1], torch.zeros_like(padded)
        for k, row in enumerate(self.weights.conv):
            dpadded[:, k : k + T].addcmul_(row, dpre)
        outside = max(0, self.beyond - segment.start)  # tokens before the first
        for part, place in zip(unflip(dpadded[:, outside:]), self.spans(segment, self.beyond), strict=True):
            dx[place] += part
        windows = padded.unfold(1, T, 1).permute(1, 0, 4, 2, 3)  # (W, K, T, b, E)
        dbias = None if self.weights.conv_bias is None else dpre.sum((1, 2), keepdim=True)
        return (windows * dpre).sum((2, 3), keepdim=True), dbias

    def spans(self, segment: Segment, beyond: int = 0) -> tuple[slice, slice]:
        """Return the tokens of a segment in both directions, in their own order, with `beyond` more that are scanned before."""
        start = max(0, segment.start - beyond)
        return slice(start, segment.stop), slice(self.length - segment.stop, self.length - start)

    def gather(self, x: Tensor, segment: Segment, beyond: int = 0) -> Tensor:
        """Return a segment (K, beyond+T, b, E) of x (L, b, E), with the `beyond` tokens before it, or zeros."""
        first, second = self.spans(segment, beyond)
        forward, backward = x[first], x[second].flip(0)
        outside = max(0, beyond - segment.start)
        if outside:
            zeros = x.new_zeros(outside, *x.shape[1:])
            forward, backward = torch.cat((zeros, forward)), torch.cat((zeros, backward))
        return torch.stack((forward, backward))

    def copy(self, x: Tensor) -> Tensor:
        """Return a copy of x in memory of `empty_vectors`."""
        return empty_vectors(x.shape, **self.options).copy_(x)


def _softplus_backward(grad: Tensor, raw: Tensor) -> Tensor:
    return torch.ops.aten.softplus_backward(grad, raw, 1, 20)
