"""Both directions of a mixer over a video in chunks, in two walks of which the first makes states alone.

    right to left:   what enters every piece of time of the backward scan; not over the first chunk, which comes last
    left to right:   what enters those of the forward scan; then both scans at once, as over a whole clip

So the work of either scan is done once: the passes for the states that enter pieces are made anyway where time is cut. Where it
is not, in batches that fill a GPU by themselves, `suits` says so. Without gradients, and no operators: nothing to be traced.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused.ops.causal_conv1d import launch as conv
from fused.ops.mamba_inner.native import NAMES, PACKED, Parts, packed
from fused.ops.mamba_inner.pack_kernel import Packed
from fused.ops.selective_scan import launch as scan
from fused.ops.selective_scan import schedule
from fused.ops.selective_scan.native import plan, whole
from fused.runtime.modes import is_batch_invariant


class Entering(NamedTuple):
    """What the backward scan of a chunk starts from: None at the end of the video, or what is not known."""

    taps: Tensor | None  # (B, E, K-1) in the stream's dtype
    edge: Tensor | None  # (B, E, N) float32
    pieces: Tensor | None  # (1, B, pieces, E, N) float32


class Mixer:
    """A mixer's two directions, as `walk` takes one, A itself; weights are packed once for all chunks."""

    nothing = Entering(None, None, None)

    def __init__(self, directions: Sequence[dict[str, Any]]) -> None:
        self._named = [tuple(own[name] for own in directions) for name in NAMES]
        self._packed: Packed | None = None

    def suits(self, clips: int, tokens: int, device: torch.device) -> bool:
        """Whether time is cut over a chunk of so many tokens."""
        E, N = self._named[NAMES.index("A")][0].shape
        processors = schedule.multiprocessors(device)
        plan = schedule.make_schedule(clips, tokens, E, N, 2, processors, batch_invariant=is_batch_invariant())
        return clips > 0 and plan.fwd_schedule.num_splits > 1

    def behind(self, x: Tensor, entering: Entering) -> tuple[Entering, Entering]:
        """The backward direction over x (B, L, E): what enters it with its pieces, and what enters the chunk before."""
        p = Parts(x, None, [pair[1:] for pair in self._named], (True,), is_batch_invariant(), logarithm=False)
        s, leaving = self._read(p, (entering.taps,))
        enter, last = scan.states(s, whole(entering.edge), p.plan, plan(x, p.N, 2, is_batch_invariant()).fwd_schedule)
        return entering._replace(pieces=enter), Entering(leaving[0], last[0], None)

    def mix(self, xz: Tensor, state: Any, entering: Entering) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """y (B, L, E), gated, of both directions over xz (B, L, 2E), and the state that leaves the forward one."""
        taps, edge = state or (None, None)
        x, z = xz.chunk(2, dim=-1)
        p = Parts(x, z, self._named, (False, True), is_batch_invariant(), logarithm=False)
        s, leaving = self._read(p, (taps, entering.taps))
        if entering.pieces is None:
            edges = [s.A[0].new_zeros(len(x), *s.A[0].shape) if e is None else e for e in (edge, entering.edge)]
            r = scan.forward(s, torch.stack(edges), p.plan, keep=False)
            return r.y, (leaving[0], r.final[0])
        cut = p.plan.fwd_schedule
        enter, _ = scan.states(s.ahead, whole(edge), plan(x, p.N, 1, is_batch_invariant()), cut)
        starts = torch.cat((enter, entering.pieces))
        first = torch.cat((enter[:, :, 0], entering.pieces[:, :, -1])) if cut.num_unsplit else None
        r = scan.forward(s, first, p.plan, keep=False, starts=starts)
        return r.y, (leaving[0], r.final[0])

    def _read(self, p: Parts, taps: Sequence[Tensor | None]) -> tuple[scan.Streams, tuple[Tensor, ...]]:
        """What the scans of all of its directions, the last ones of two, read, and the taps that leave."""
        if self._packed is None:
            self._packed = packed(*(self._named[NAMES.index(name)] for name in PACKED))
        c, leaving = conv.forward(p.x, p.conv, p.conv_bias, taps, p.reverses, True)
        assert leaving is not None
        return p.read(c, self._packed.last(len(taps)))[-1], leaving
