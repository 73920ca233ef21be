"""The recurrence under the scan, in segments of bounded size, and its adjoint.

    h_t = a_t h_{t-1} + w_t           a_t = exp(delta_t * A)
    g_t = v_t + a_{t+1} g_{t+1}       the gradient of h_t, where v_t is the part that comes through y_t

A segment has layout (T, c, b, G, N, F): T steps, c splits, b clips, G groups that share B and C, N states, F = E // G
channels. A step is then contiguous, sums over N and broadcasts along F run on contiguous channels, and a group is only another
row. Where one token holds little work, the c splits of a segment advance together, in two passes. In the first pass each split
starts from a state of zero. With the decay over a split, exp(A * sum_t delta_t), that gives every split its initial state, from
which the second pass starts. Nothing is divided by a decay, so no decay overflows or loses digits. The splits do not depend on
the batch, so a clip's bits do not depend on the other clips.
"""

from math import isqrt, prod
from typing import NamedTuple

import torch
from torch import Tensor

# Elements (tokens x clips x channels x states) of one scratch tensor: on a CPU it stays in cache (fastest between
# 2**19 and 2**21), on a GPU it is large enough that kernel launches do not dominate.
CPU_BLOCK = 2**20
GPU_BLOCK = 2**25
# With this many elements in a token a CPU is busy; with fewer, starting the operation takes longer than the step.
CPU_STEP = 4096
MAX_STEPS = 32


Carry = tuple[Tensor, Tensor]


class Segment(NamedTuple):
    """Tokens [start, stop) as `num_splits` splits of equal length, with `state_passing` between them, or as one."""

    start: int
    stop: int
    num_splits: int
    state_passing: bool


def make_segments(batch: int, length: int, row: int, gpu: bool, reverse: bool) -> tuple[list[slice], list[Segment]]:
    """Return the clips that are scanned together, and the segments in the order of the scan; `row` is E * N."""
    block = GPU_BLOCK if gpu else CPU_BLOCK
    steps = min(MAX_STEPS, isqrt(length // 2)) if gpu or row < CPU_STEP else 0
    clips = max(1, min(batch, block // (max(steps, 8) * row)))
    tokens = max(1, block // (clips * row))
    segments, start = [], 0
    if steps > 1:
        end = length // steps * steps  # splits of `steps` tokens up to here, single splits beyond
        while start < end:
            num_splits = min(max(1, tokens // steps), (end - start) // steps)
            segments.append(Segment(start, start + num_splits * steps, num_splits, True))
            start += num_splits * steps
    while start < length:
        stop = min(start + tokens, length)
        segments.append(Segment(start, stop, 1, False))
        start = stop
    if reverse:
        segments = [p._replace(start=length - p.stop, stop=length - p.start) for p in segments]
    return [slice(i, min(i + clips, batch)) for i in range(0, batch, clips)], segments


class Recurrence:
    """The segments of a scan in scratch memory: a method's results are overwritten by the next call."""

    def __init__(self, A: Tensor, reverse: bool, clips: int, segments: list[Segment], buffers: int) -> None:
        """Take A (G, N, F); at most `clips` are scanned together; `buffers` is 2, or 3 for a backward."""
        self.A, self.reverse, self.channels = A, reverse, A.shape[::2]
        tokens = max((p.stop - p.start + p.num_splits for p in segments), default=0)
        self.buffers = [A.new_empty(clips * tokens * A.numel()) for _ in range(buffers)]

    def view(self, x: Tensor, segment: Segment) -> Tensor:
        """Return the segment of x (b, L, E) as (T, c, b, G, 1, F), or of x (b, L, G, N) as (T, c, b, G, N, 1), a view."""
        channels = x.dim() == 3
        x = x[:, segment.start : segment.stop].unflatten(1, (segment.num_splits, -1))
        x = (x.unflatten(-1, self.channels) if channels else x).permute(2, 1, 0, 3, 4)
        return x.unsqueeze(-2 if channels else -1)

    def buffer(self, i: int, *shape: int) -> Tensor:
        """Return scratch memory number `i` in this shape."""
        return self.buffers[i][: prod(shape)].view(shape)

    def forward(self, delta: Tensor, w: tuple[Tensor, Tensor], state: Tensor, segment: Segment) -> tuple[Tensor, ...]:
        """Run a segment from `state` (b, G, N, F), with w_t the product of the two factors `w`.

        Returns the decays (T, c, b, G, N, F), the states before and after each token (overlapping views of that shape), and the
        state (b, G, N, F) that leaves.
        """
        steps, *rest = *delta.shape[:-2], *self.A.shape[1:]
        a = torch.mul(delta, self.A, out=self.buffer(0, steps, *rest)).exp_()
        h = self.buffer(1, steps + 1, *rest)
        before, after = (h[1:], h[:-1]) if self.reverse else (h[:-1], h[1:])
        torch.mul(*w, out=after)
        order = range(steps)[:: -1 if self.reverse else 1]
        decay, states, start = a.unbind(), after.unbind(), before[order[0]]
        if segment.state_passing:
            local = states[order[0]].clone()
            for t in order[1:]:
                torch.addcmul(states[t], decay[t], local, out=local)
            state = _pass_states(start, self.split_decay(delta), local, state, self.reverse)
        else:
            start.copy_(state)
        current = start
        for t in order:
            current = states[t].addcmul_(decay[t], current)
        return a, before, after, state if segment.state_passing else current[0].clone()

    def backward(self, a: Tensor, g: Tensor, delta: Tensor, carry: Carry, segment: Segment) -> Carry:
        """Turn v_t in `g` into g_t in place; the product of `carry` is the gradient of the state that left the segment.

        Returns the gradient of the state that entered it, again as (a_t, g_t) of the nearest token. One multiply-add then takes
        it across the edge, as inside a segment, so that the edges do not show in the last bit.
        """
        order = range(g.shape[0])[:: 1 if self.reverse else -1]
        decay, adjoints = a.unbind(), g.unbind()
        if segment.state_passing:
            local, start = adjoints[order[0]].clone(), torch.empty_like(g[0])
            for t, later in zip(order[1:], order, strict=False):
                torch.addcmul(adjoints[t], decay[later], local, out=local)
            local.mul_(decay[order[-1]])
            entered = _pass_states(start, self.split_decay(delta), local, carry[0] * carry[1], not self.reverse)
            carry = torch.ones_like(entered), start
        current = adjoints[order[0]].addcmul_(*carry)
        for t, later in zip(order[1:], order, strict=False):
            current = adjoints[t].addcmul_(decay[later], current)
        return (carry[0], entered) if segment.state_passing else (decay[order[-1]][0].clone(), current[0].clone())

    def split_decay(self, delta: Tensor) -> Tensor:
        """Return exp(A * sum_t delta_t) of every split, (c, b, G, N, F)."""
        return (delta.sum(0) * self.A).exp_()


def _pass_states(start: Tensor, decay: Tensor, local: Tensor, state: Tensor, reverse: bool) -> Tensor:
    """Carry `state` (b, G, N, F) through the splits; return the state that leaves the last.

    start, decay and local are (c, b, G, N, F). The state that enters each split is written into `start`; `local`, the states
    that leave the splits if zero enters them, is overwritten.
    """
    order = range(local.shape[0])[:: -1 if reverse else 1]
    states, decays, current = local.unbind(), decay.unbind(), state
    for c in order:
        current = states[c].addcmul_(decays[c], current)
    start[order[0]].copy_(state)
    if reverse:
        start[:-1].copy_(local[1:])
    else:
        start[1:].copy_(local[:-1])
    return current
