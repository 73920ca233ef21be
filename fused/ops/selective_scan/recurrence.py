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
import threading
from math import isqrt, prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused.runtime.elementwise import by_vectors, empty_vectors, whole_vectors

# Elements (tokens x directions x clips x channels x states) of one scratch tensor: on a CPU it stays in cache (fastest between
# 2**19 and 2**21), on a GPU it is large enough that kernel launches do not dominate.
CPU_BLOCK = 2**20
GPU_BLOCK = 2**25
# With this many elements in a token a CPU is busy; with fewer, starting the operation takes longer than the step.
CPU_STEP = 4096
MAX_STEPS = 32


_kept = threading.local()
Carry = tuple[Tensor, Tensor]
States = tuple[Tensor, Tensor, Tensor]
"""Decays, and the states before and after each token, of a segment, (T, c, K, b, G, N, F)."""


class Segment(NamedTuple):
    """Tokens [start, stop) as `num_splits` splits of equal length, with `state_passing` between them, or as one."""

    start: int
    stop: int
    num_splits: int
    state_passing: bool


def make_segments(batch: int, length: int, row: int, gpu: bool, divisor: int = 1) -> tuple[list[slice], list[Segment]]:
    """Return the clips that are scanned together, and the segments in the order of the scan; `row` is K * E * N.

    `divisor` divides the number of elements of a segment.
    """
    block = (GPU_BLOCK if gpu else CPU_BLOCK) // divisor
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

    def __init__(self, A: Tensor, clips: int, segments: list[Segment], buffers: int, keep: bool = False) -> None:
        """Take A (K, 1, G, N, F); at most `clips` are scanned together; `buffers` is 2, or 3 for a backward.

        With `keep`, for one segment of all clips, the memory is new and nothing overwrites it.
        """
        self.A, self.log2_decay, self.channels = A, A * math.log2(math.e), A.shape[2::2]
        tokens = max((p.stop - p.start + p.num_splits for p in segments), default=0)
        self.options: dict[str, Any] = {"dtype": A.dtype, "device": A.device}
        self.buffers = (_new_scratch if keep else _scratch)(A, whole_vectors(clips * tokens * A.numel()), buffers)
        self.steps: dict[tuple[int, ...], tuple[Tensor, tuple[Tensor, ...]]] = {}

    def view(self, x: Tensor, segment: Segment) -> Tensor:
        """Return x (K, b, c * T, E) as (T, c, K, b, G, 1, F), or x (K, b, c * T, G, N) as (T, c, K, b, G, N, 1), a view."""
        K, b, tokens, *rest = x.shape
        rows = self.channels if x.dim() == 4 else rest
        x = x.view(K, b, segment.num_splits, tokens // segment.num_splits, *rows).permute(3, 2, 0, 1, 4, 5)
        return x.unsqueeze(-1 if len(rest) == 2 else -2)

    def tokens(self, x: Tensor) -> Tensor:
        """Return x (T, c, K, b, G, X) as (K, b, c * T, G, X)."""
        return x.permute(2, 3, 1, 0, 4, 5).flatten(2, 3)

    def buffer(self, i: int, *shape: int) -> Tensor:
        """Return scratch memory number `i` in this shape."""
        return self.buffers[i][: prod(shape)].view(shape)

    def buffer_and_steps(self, i: int, *shape: int) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return scratch memory number `i` in this shape, and its steps, views along the first axis."""
        key = i, *shape
        if key not in self.steps:
            x = self.buffer(*key)
            self.steps[key] = x, x.unbind()
        return self.steps[key]

    def states(self, like: Tensor) -> Tensor:
        """Return the states of the last segment, (T+1, c, K, b, G, N, F), for `like`, its decays (T, c, K, b, G, N, F)."""
        return self.buffer(1, len(like) + 1, *like.shape[1:])

    def forward(self, delta: Tensor, w: tuple[Tensor, Tensor], state: Tensor, segment: Segment) -> tuple[Tensor, ...]:
        """Run a segment from `state` (K, b, G, N, F), with w_t the product of the two factors `w`.

        Returns the decays (T, c, K, b, G, N, F), the states before and after each token (overlapping views of that shape), and
        the state (K, b, G, N, F) that leaves.
        """
        steps, *rest = *delta.shape[:-2], *self.log2_decay.shape[-2:]
        a, decay = self.buffer_and_steps(0, steps, *rest)
        h, states = self.buffer_and_steps(1, steps + 1, *rest)
        torch.mul(delta, self.log2_decay, out=a)
        by_vectors(torch.exp2_, a)
        torch.mul(*w, out=h[1:])
        start = states[0]
        if segment.state_passing:
            local = states[1].clone()
            for t in range(1, steps):
                torch.addcmul(states[t + 1], decay[t], local, out=local)
            state = _pass_states(start, self.split_decay(delta), local, state, False).clone()
        else:
            start[0].copy_(state)
        for before, factor, after in zip(states, decay, states[1:], strict=False):
            after.addcmul_(factor, before)
        return a, h[:-1], h[1:], state if segment.state_passing else states[-1][0].clone()

    def gradients(
        self, kept: States, delta: Tensor, w: tuple[Tensor, Tensor], C: Tensor, dy: Tensor, carry: Carry,
        segment: Segment,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Carry]:  # fmt: skip
        """Return the gradients of delta, x, B and C of a segment, as (T, c, K, b, G, F) and (T, c, K, b, G, N), and of A,
        (K, G, N, F), and the `carry` of the segment before.

        `kept` is what `forward` returned of this segment; `w` is (x, B); dy is the gradient of y_t = sum_n C_t h_t. With g_t
        the gradient of h_t, q_t = g_t a_t h_{t-1} is the gradient of delta_t * A.
        """
        (a, before, after), (x, B) = kept, w
        # kept in scratch memory they are in buffers 0 and 1, and overwritten where they are not read again
        g, free, scratch = self.buffer(2, *a.shape), self.buffer(0, *a.shape), self.states(a)[1:]
        carry = self.backward(a, torch.mul(C, dy, out=g), delta, carry, segment)
        q = torch.mul(a, before, out=free).mul_(g)
        dC = sum_channels(after, dy, scratch=scratch)
        dx = sum_states(g, B, scratch=scratch)
        ddelta = torch.mul(q, self.A, out=scratch).sum(-2)
        dB = sum_channels(g, x, scratch=g)
        return ddelta, dx, dB, dC, sum_tokens(q.mul_(delta)), carry

    def backward(self, a: Tensor, g: Tensor, delta: Tensor, carry: Carry, segment: Segment) -> Carry:
        """Turn v_t in `g` into g_t in place; the product of `carry` is the gradient of the state that left the segment.

        `g` is scratch memory 2. Returns the gradient of the state that entered the segment, again as (a_t, g_t)
        of the nearest token. One multiply-add then takes it across the edge, as inside a segment, so that the edges do not show
        in the last bit.
        """
        decay, (_, adjoints) = a.unbind(), self.buffer_and_steps(2, *g.shape)
        last = len(adjoints) - 1
        if segment.state_passing:
            local, start = adjoints[last].clone(), torch.empty_like(g[0])
            for t in range(last, 0, -1):
                torch.addcmul(adjoints[t - 1], decay[t], local, out=local)
            local.mul_(decay[0])
            entered = _pass_states(start, self.split_decay(delta), local, carry[0] * carry[1], True)
            carry = torch.ones_like(entered), start
        adjoints[last].addcmul_(*carry)
        for after, factor, before in zip(adjoints[:0:-1], decay[:0:-1], adjoints[-2::-1], strict=True):
            before.addcmul_(factor, after)
        return (carry[0], entered) if segment.state_passing else (decay[0][0].clone(), adjoints[0][0].clone())

    def split_decay(self, delta: Tensor) -> Tensor:
        """Return exp(A * sum_t delta_t) of every split, (c, K, b, G, N, F)."""
        decay = empty_vectors(torch.broadcast_shapes(delta.shape[1:], self.log2_decay.shape), **self.options)
        torch.mul(delta.sum(0), self.log2_decay, out=decay)
        return by_vectors(torch.exp2, decay)


def sum_states(h: Tensor, C: Tensor, scratch: Tensor) -> Tensor:
    """Return sum_n C h (..., F) of h (..., N, F) and C (..., N, 1); `scratch` is like h, or h itself."""
    if _multiplies_exactly(h):
        return torch.bmm(C.reshape(-1, 1, C.shape[-2]), h.flatten(0, -3)).view(*h.shape[:-2], h.shape[-1])
    return torch.mul(h, C, out=scratch).sum(-2)


def sum_channels(h: Tensor, x: Tensor, scratch: Tensor) -> Tensor:
    """Return sum_f x h (..., N) of h (..., N, F) and x (..., 1, F); `scratch` is like h, or h itself."""
    if _multiplies_exactly(h):  # as a row times a matrix: a matrix times a column takes MKL 8 times as long
        return torch.bmm(x.reshape(-1, 1, x.shape[-1]), h.flatten(0, -3).mT).view(h.shape[:-1])
    return torch.mul(h, x, out=scratch).sum(-1)


def sum_tokens(x: Tensor) -> Tensor:
    """Return the sum (K, G, N, F) over all tokens of x (T, c, K, b, G, N, F)."""
    if _multiplies_exactly(x):
        x = torch.mm(x.new_ones(1, x.shape[0] * x.shape[1]), x.flatten(0, 1).flatten(1)).view(1, 1, *x.shape[2:])
    return x.sum((0, 1, 3))


def _multiplies_exactly(x: Tensor) -> bool:
    """Return whether a matrix product on x's device keeps the precision of its inputs, which a user may have lowered."""
    if x.device.type != "cpu":
        return False
    try:
        return torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # it was set by the newer settings, one for each library, which this one does not know
        return False


def _scratch(like: Tensor, elements: int, buffers: int) -> list[Tensor]:
    """Return flat tensors of at least so many elements, like `like`.

    On a CPU a thread uses the same memory in every scan: the first use of new memory costs as much as a short scan.
    """
    if type(like) is not Tensor or like.device.type != "cpu":
        return _new_scratch(like, elements, buffers)
    kept = _kept.__dict__.setdefault(str(like.dtype), [])
    with torch.inference_mode(False):
        for i in range(buffers):
            if i == len(kept) or kept[i].numel() < elements:
                kept[i : i + 1] = [torch.empty(elements, dtype=like.dtype)]
    return kept[:buffers]


def _new_scratch(like: Tensor, elements: int, buffers: int) -> list[Tensor]:
    return [like.new_empty(elements) for _ in range(buffers)]


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
