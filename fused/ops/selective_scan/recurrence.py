"""The recurrence under the scan, in segments of bounded size, and its adjoint.

    h_t = a_t h_{t-1} + w_t           a_t = exp(delta_t * A) = 2^(delta_t * A log2(e))
    g_t = v_t + a_{t+1} g_{t+1}       the gradient of h_t, where v_t is the part that comes through y_t

One or two scans, called directions, advance together, each with an A of its own. A segment has layout (T, c, K, b, G, N, F): T
steps, c splits, K directions, b clips, G groups that share B and C, N states, F = E // G channels. A step is then contiguous,
sums over N and broadcasts along F run on contiguous channels, and a direction or a group is only another row. Where one token
holds little work, the c splits of a segment advance together, in two passes. In the first pass each split starts from a state
of zero. With the decay over a split, exp(A * sum_t delta_t), that gives every split its initial state, from which the second
pass starts. Nothing is divided by a decay, so no decay overflows or loses digits. The splits do not depend on the batch, so a
clip's bits do not depend on the other clips.

Decays are powers of 2: PyTorch's exp2 is in vectors on every CPU, while its exp is MKL's, which takes 4 times as long on AMD's.
"""

import math
from collections.abc import Sequence
from math import isqrt
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused.runtime.elementwise import by_vectors, empty_vectors
from fused.runtime.scratch import Scratch

# Elements (tokens x directions x clips x channels x states) of one scratch tensor: on a CPU it stays in cache (fastest between
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


def make_segments(batch: int, length: int, row: int, gpu: bool) -> tuple[list[slice], list[Segment]]:
    """Return the clips that are scanned together, and the segments in the order of the scan; `row` is K * E * N."""
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
    return [slice(i, min(i + clips, batch)) for i in range(0, batch, clips)], segments


class Recurrence:
    """The segments of a scan in scratch memory, which the next call overwrites."""

    def __init__(self, A: Tensor) -> None:
        """Take A (K, 1, G, N, F)."""
        self.A, self.log2_decay, self.channels = A, A * math.log2(math.e), A.shape[2::2]
        self.options: dict[str, Any] = {"dtype": A.dtype, "device": A.device}
        self.scratch = Scratch(A)

    def view(self, x: Tensor, segment: Segment) -> Tensor:
        """Return x (K, b, c * T, E) as (T, c, K, b, G, 1, F), or x (K, b, c * T, G, N) as (T, c, K, b, G, N, 1), a view."""
        K, b, tokens, *rest = x.shape
        rows = self.channels if x.dim() == 4 else rest
        x = x.view(K, b, segment.num_splits, tokens // segment.num_splits, *rows).permute(3, 2, 0, 1, 4, 5)
        return x.unsqueeze(-1 if len(rest) == 2 else -2)

    def tokens(self, x: Tensor) -> Tensor:
        """Return x (T, c, K, b, G, X) as (K, b, c * T, G, X)."""
        return x.permute(2, 3, 1, 0, 4, 5).flatten(2, 3)

    def forward(self, delta: Tensor, w: tuple[Tensor, Tensor], state: Tensor | None, segment: Segment) -> tuple[Tensor, Tensor]:
        """Run a segment from `state` (K, b, G, N, F), zero without it, with w_t the product of the two factors `w`.

        Returns the states after each token (T, c, K, b, G, N, F), and the one that leaves (K, b, G, N, F), which may be a view
        of them.
        """
        steps, *rest = *delta.shape[:-2], *self.log2_decay.shape[-2:]
        a, decay = self.scratch.tensor_and_steps("decays", (steps, *rest))
        h, states = self.scratch.tensor_and_steps("states", (steps + 1, *rest))
        start, after = states[0], h[1:]
        if state is None:
            start.zero_()
        else:
            start[0].copy_(state)  # first: it may be the state that left the segment before, in the same memory
        torch.mul(delta, self.log2_decay, out=a)
        by_vectors(torch.exp2_, a)
        torch.mul(*w, out=after)
        if segment.state_passing:
            local = states[1].clone()
            for t in range(1, steps):
                torch.addcmul(states[t + 1], decay[t], local, out=local)
            leaving = _pass_states(start, self.split_decay(delta), local, start[0].clone(), False)
        for before, factor, next_ in zip(states, decay, states[1:], strict=False):
            next_.addcmul_(factor, before)
        return after, leaving if segment.state_passing else states[-1][0]

    def gradients(
        self, delta: Tensor, w: tuple[Tensor, Tensor], C: Tensor, dy: Tensor, carry: Carry | None, segment: Segment,
        out: Sequence[Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Carry]:  # fmt: skip
        """Return the gradients of delta, x, B and C of a segment, as (T, c, K, b, G, F) and (T, c, K, b, G, N), and of A,
        (K, G, N, F), and the `carry` of the segment before; without `carry` no gradient enters.

        `forward` has run this segment last; its decays and states are overwritten. `w` is (x, B); dy is the gradient of
        y_t = sum_n C_t h_t. With g_t the gradient of h_t, q_t = g_t a_t h_{t-1} is the gradient of delta_t * A. The first four
        are written into `out` if it is given.
        """
        x, B = w
        shape = *delta.shape[:-2], *self.A.shape[-2:]
        a, g = (self.scratch.tensor(name, shape) for name in ("decays", "adjoints"))
        h = self.scratch.tensor("states", (shape[0] + 1, *shape[1:]))
        before, after = h[:-1], h[1:]
        ddelta, dx, dB, dC = out or (None,) * 4
        torch.mul(C, dy, out=g)
        carry = self.backward(delta, carry, segment)
        q = a.mul_(before).mul_(g)
        dC = sum_channels(after, dy, scratch=after, out=dC)
        dx = sum_states(g, B, scratch=after, out=dx)
        ddelta = torch.sum(torch.mul(q, self.A, out=after), -2, out=ddelta)
        dB = sum_channels(g, x, scratch=g, out=dB)
        return ddelta, dx, dB, dC, sum_tokens(q.mul_(delta)), carry

    def backward(self, delta: Tensor, carry: Carry | None, segment: Segment) -> Carry:
        """Turn v_t in the adjoints into g_t in place; the product of `carry` is the gradient of the state that leaves.

        Returns the gradient of the state that entered the segment, again as (a_t, g_t) of the nearest token. One multiply-add
        then takes it across the edge, as inside a segment, so that the edges do not show in the last bit.
        """
        shape = *delta.shape[:-2], *self.A.shape[-2:]
        _, decay = self.scratch.tensor_and_steps("decays", shape)
        _, adjoints = self.scratch.tensor_and_steps("adjoints", shape)
        last = len(adjoints) - 1
        if segment.state_passing:
            local, start = adjoints[last].clone(), torch.empty_like(adjoints[0])
            for t in range(last, 0, -1):
                torch.addcmul(adjoints[t - 1], decay[t], local, out=local)
            local.mul_(decay[0])
            entering = torch.zeros_like(local[0]) if carry is None else carry[0] * carry[1]
            entered = _pass_states(start, self.split_decay(delta), local, entering, True)
            carry = torch.ones_like(entered), start
        if carry is not None:
            adjoints[last].addcmul_(*carry)
        for after, factor, before in zip(adjoints[:0:-1], decay[:0:-1], adjoints[-2::-1], strict=True):
            before.addcmul_(factor, after)
        return (torch.ones_like(entered), entered) if segment.state_passing else (decay[0][0].clone(), adjoints[0][0].clone())

    def split_decay(self, delta: Tensor) -> Tensor:
        """Return exp(A * sum_t delta_t) of every split, (c, K, b, G, N, F)."""
        decay = empty_vectors(torch.broadcast_shapes(delta.shape[1:], self.log2_decay.shape), **self.options)
        torch.mul(delta.sum(0), self.log2_decay, out=decay)
        return by_vectors(torch.exp2, decay)


def sum_states(h: Tensor, C: Tensor, scratch: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """Return sum_n C h (..., F) of h (..., N, F) and C (..., N, 1), in `out` if it is given.

    `scratch`, if it is given, is like h, or h itself.
    """
    if _multiplies_exactly(h):
        return _multiply_rows(C.reshape(-1, 1, C.shape[-2]), h.flatten(0, -3), (*h.shape[:-2], h.shape[-1]), out)
    return torch.sum(torch.mul(h, C, out=scratch), -2, out=out)


def sum_channels(h: Tensor, x: Tensor, scratch: Tensor, out: Tensor | None = None) -> Tensor:
    """Return sum_f x h (..., N) of h (..., N, F) and x (..., 1, F), in `out` if it is given.

    `scratch` is like h, or h itself.
    """
    if _multiplies_exactly(h):  # as a row times a matrix: a matrix times a column takes MKL 8 times as long
        return _multiply_rows(x.reshape(-1, 1, x.shape[-1]), h.flatten(0, -3).mT, h.shape[:-1], out)
    return torch.sum(torch.mul(h, x, out=scratch), -1, out=out)


def _multiply_rows(rows: Tensor, matrices: Tensor, shape: Sequence[int], out: Tensor | None) -> Tensor:
    """Return the products of rows (m, 1, i) and matrices (m, i, o) in this shape, in `out` if it is given."""
    if out is None or not out.is_contiguous():
        product = torch.bmm(rows, matrices).view(shape)
        return product if out is None else out.copy_(product)
    torch.bmm(rows, matrices, out=out.view(len(rows), 1, -1))
    return out


def sum_tokens(x: Tensor) -> Tensor:
    """Return the sum (K, G, N, F) over all tokens of x (T, c, K, b, G, N, F)."""
    if not _multiplies_exactly(x):
        return x.sum((0, 1, 3))
    clips = torch.mm(x.new_ones(1, x.shape[0] * x.shape[1]), x.flatten(0, 1).flatten(1)).view(x.shape[2:])
    return clips.sum(1) if clips.shape[1] > 1 else clips[:, 0]


def _multiplies_exactly(x: Tensor) -> bool:
    """Return whether a matrix product on x's device keeps the precision of its inputs, which a user may have lowered."""
    if x.device.type != "cpu":
        return False
    try:
        return torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # it was set by the newer settings, one for each library, which this one does not know
        return False


def _pass_states(start: Tensor, decay: Tensor, local: Tensor, state: Tensor, reverse: bool) -> Tensor:
    """Carry `state` (K, b, G, N, F) through the splits; return the state that leaves the last.

    start, decay and local are (c, K, b, G, N, F). The state that enters each split is written into `start`; `local`, the states
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
