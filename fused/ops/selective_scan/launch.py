"""The selective scan's kernels: which are launched for what, on which pieces of time. No autograd here.

Everything comes once per direction: a walk from the first token, one from the last, or both at once over the same tokens
(`Streams.reverses`). Two directions share z: out = (y_first + y_second) * silu(z).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused.ops.selective_scan.kernel_source import A_LOG, REVERSE, STATES_ONLY, defines, num_work_counters, source
from fused.ops.selective_scan.schedule import TILE, ScanSchedule, SplitSchedule, multiprocessors
from fused.runtime import nvrtc

LONGEST_STATE = 64


class Streams(NamedTuple):
    """What a scan reads. u, delta, z (B, L, E) and B, C (B, L, N) in one dtype with unit stride along the last axis; A (E, N),
    D and bias (E,) float32 and contiguous."""

    reverses: tuple[bool, ...]  # (False,), (True,) or (False, True)
    u: tuple[Tensor, ...]
    delta: tuple[Tensor, ...]
    A: tuple[Tensor, ...]
    B: tuple[Tensor, ...]
    C: tuple[Tensor, ...]
    D: tuple[Tensor | None, ...]
    bias: tuple[Tensor | None, ...]
    z: Tensor | None
    softplus: int = 1  # 0: delta has none; 1: delta comes before it; 2: delta comes behind it, its gradient is that before it
    logarithm: bool = False  # A holds log(-A)

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """B, L, E, N."""
        return (*self.u[0].shape, self.A[0].shape[1])

    @property
    def ahead(self) -> "Streams":
        """The first direction alone, without the gate."""
        pairs = ("reverses", "u", "delta", "A", "B", "C", "D", "bias")
        return self._replace(z=None, **{name: getattr(self, name)[:1] for name in pairs})

    @property
    def flags(self) -> int:
        """What the kernels must know at run time."""
        return A_LOG * self.logarithm + REVERSE * self.reverses[0]


class Result(NamedTuple):
    """What `forward` leaves; what was not asked for is None. d directions."""

    y: Tensor  # (B, L, E)
    final: Tensor  # (d, B, E, N) float32
    starts: Tensor | None  # (d, B, pieces, E, N) float32: the state that enters every piece of a chain that is cut
    ungated: Tensor | None  # (B, L, E): y before the gate; y itself without one
    marks: Tensor | None  # (d, B, tiles, E, N) float32: the state before every tile


def forward(
    s: Streams, initial: Tensor | None, plan: ScanSchedule, *, keep: bool, starts: Tensor | None = None,
    beside: Tensor | None = None,
) -> Result:  # fmt: skip
    """Scan from `initial` (d, B, E, N), of one direction (B, E, N), or from zero, and `keep` what the backward wants. `starts`
    of an earlier call or of `states` saves the pass for them. `beside` (B, L, E), contiguous, is another direction's y, which
    one direction adds to its own before the gate."""
    B, L, E, N = s.sizes
    u, d = s.u[0], len(s.reverses)
    y, final = u.new_empty((B, L, E)), _wide(u, d, B, E, N)
    before = torch.empty_like(y) if keep and s.z is not None else None
    seen = _wide(u, d, B, -(-L // TILE), E, N) if keep else None
    if 0 in (B, L, E):
        final = final.zero_() if initial is None else final.copy_(initial)
        return Result(y, final, starts, before, seen)
    cut, shape = plan.fwd_schedule, plan.fwd_config
    passes = Passes.over(cut, s, d * shape.warps, starts is None)
    if passes.blocks:
        starts = _wide(u, d, B, cut.num_splits, E, N)
    sizes = (B, L, E, N, cut.tiles_per_split, cut.num_splits, cut.num_unsplit, s.flags)
    args = (initial, starts, passes.local, passes.sums, final, seen, y, before, beside, *passes[2:], *sizes)
    _launch_forward(s, plan, cut.num_blocks + passes.blocks, args, keep, beside)
    return Result(y, final, starts, y if s.z is None and keep else before, seen)


def states(s: Streams, initial: Tensor | None, plan: ScanSchedule, cut: SplitSchedule) -> tuple[Tensor, Tensor]:
    """No y, but what enters every piece of time and what leaves the last: (d, B, pieces, E, N) and (d, B, E, N), float32, from
    `initial` (d, B, E, N) or zero. All chains are cut as `cut` says, those too that it leaves whole; C and z are not read."""
    B, L, E, N = s.sizes
    u, d = s.u[0], len(s.reverses)
    enter, local, last = (_wide(u, d, B, *sizes) for sizes in ((cut.num_splits, E, N), (cut.num_splits, E, N), (E, N)))
    passes, counts = cut.num_sequences * cut.num_splits, _counts(u, cut.num_sequences)
    made = (enter, local, _wide(u, d, B, cut.num_splits, E), last)
    sizes = (B, L, E, N, cut.tiles_per_split, cut.num_splits, 0, s.flags | STATES_ONLY)
    args = (initial, *made, None, u, None, None, counts, passes, 0, *sizes)
    _launch_forward(s, plan, passes + cut.num_sequences * (cut.num_splits + 1), args)
    return enter, last


def _launch_forward(
    s: Streams, plan: ScanSchedule, blocks: int, args: tuple[Any, ...], keep: bool = False, beside: Tensor | None = None
) -> None:
    d, width = len(s.reverses), plan.fwd_config.channels
    shared = d * TILE * (width * 8 + 2 * plan.padded_states * 4 + (width + 8) * 4)  # staged inputs and y
    threads, module = d * 32 * plan.fwd_config.warps, _module(s, plan, keep, beside)
    module.launch("scan_forward", (blocks, 1, 1), threads, shared, *_arguments(s), *args)


def _counts(u: Tensor, chains: int) -> Tensor:
    """Of a launch with so many chains that are cut, as WorkQueue in work.cu wants them."""
    return torch.zeros(num_work_counters(chains), dtype=torch.int32, device=u.device)


class Passes(NamedTuple):
    """How pieces of time hear of one another within a launch: what goes from piece to piece, float32, and the counters."""

    local: Tensor | None  # (d, B, pieces, E, N): what leaves a piece that nothing enters
    sums: Tensor | None  # (d, B, pieces, E): of delta
    counts: Tensor | None  # None where all chains are alike
    blocks: int  # 0 where nothing goes from piece to piece
    even: int  # whole chains for a multiprocessor's schedulers, as many of the four as a block has warps

    @classmethod
    def over(cls, cut: SplitSchedule, s: Streams, warps: int, wanted: bool = True) -> "Passes":
        """Empty; without passes, if they are not `wanted`."""
        if cut.num_unsplit == cut.num_sequences or not (wanted or cut.num_unsplit):
            return cls(None, None, None, 0, 0)
        (B, _, E, N), u = s.sizes, s.u[0]
        counts = _counts(u, cut.num_sequences - cut.num_unsplit)
        even = -(-cut.num_unsplit // (multiprocessors(u.device) * max(1, 4 // warps)))
        if not wanted:
            return cls(None, None, counts, 0, even)
        shape = (len(s.reverses), B, cut.num_splits, E)
        return cls(_wide(u, *shape, N), _wide(u, *shape), counts, cut.num_state_passes, even)


class Gradients(NamedTuple):
    """What `backward` returns, per direction but for z; float32 for what is summed over clips and for the state."""

    u: tuple[Tensor, ...]  # (B, L, E)
    delta: tuple[Tensor, ...]  # (B, L, E)
    z: Tensor | None  # (B, L, E)
    A: tuple[Tensor, ...]  # (E, N); of A's logarithm, where that came
    D: tuple[Tensor, ...]  # (E,)
    bias: tuple[Tensor, ...]  # (E,)
    initial: Tensor  # (d, B, E, N)


def backward(
    s: Streams, dy: Tensor, dfinal: Tensor | None, marks: Tensor, ungated: Tensor | None, plan: ScanSchedule,
    dB: Sequence[Tensor], dC: Sequence[Tensor], du: Sequence[Tensor] = (), ddelta: Sequence[Tensor] = (),
    dz: Tensor | None = None,
) -> Gradients:  # fmt: skip
    """Gradients, given dy (B, L, E) with unit stride along E and dfinal (d, B, E, N) or None. Those of B and C are written
    into `dB` and `dC`, (B, L, N) each, of unit stride along N, and the others into contiguous `du` and `ddelta` and a `dz` of
    unit stride along E if these came."""
    B, L, E, N = s.sizes
    u, d, cut, shape = s.u[0], len(s.reverses), plan.bwd_schedule, plan.bwd_config
    du, ddelta = (tuple(given) or tuple(u.new_empty((B, L, E)) for _ in range(d)) for given in (du, ddelta))
    if s.z is not None and dz is None:
        dz = u.new_empty((B, L, E))
    dinitial = _wide(u, d, B, E, N)
    dA, dD, dbias = (tuple(_wide(u, *shape) for _ in range(d)) for shape in ((E, N), (E,), (E,)))
    if 0 in (B, L, E):
        dinitial = dinitial.zero_() if dfinal is None else dinitial.copy_(dfinal)
        for x in (*dB, *dC, *dA, *dD, *dbias):
            x.zero_()
        return Gradients(du, ddelta, dz, dA, dD, dbias, dinitial)
    module, arguments = _module(s, plan, True, dy, dz), _arguments(s)
    threads, shared = 32 * shape.warps, _shared_backward(plan, u.element_size())
    blocks, width = -(-E // shape.channels), -(-E * (N + 2) // 4) * 4
    parts = _wide(u, d, B, L, blocks, 2, plan.padded_states)
    rows = _wide(u, d, B * cut.num_splits, width)
    passes = Passes.over(cut, s, shape.warps)
    given = (dy, *_steps(dy), ungated, marks, dfinal, passes.local, passes.sums)
    made = (*_both(du), *_both(ddelta), dz, *(_steps(dz) if dz is not None else (0, 0)), parts, rows, dinitial)
    sizes = (B, L, E, N, cut.tiles_per_split, cut.num_splits, cut.num_unsplit, s.flags)
    args = (*arguments, *given, *made, *passes[2:], *sizes)
    module.launch("scan_backward", (cut.num_blocks + passes.blocks, 1, 1), threads, shared, *args)
    sums = (*_both(s.A), *_both(dA), *_both(dD), *_both(dbias))
    args = (parts, *_both(dB), *_steps(dB[0]), *_both(dC), *_steps(dC[0]), rows, width, *sums, *sizes)
    grid = -(-L * 2 * plan.padded_states // 256) * B + -(-E * (N + 2) // 256)
    module.launch("scan_backward_reduce", (grid, d, 1), 256, 0, *args)
    return Gradients(du, ddelta, dz, dA, dD, dbias, dinitial)


def _shared_backward(plan: ScanSchedule, size: int) -> int:
    """Bytes of a block, `size` of an element: staged inputs, held states, results, sums, what is fetched ahead."""
    K, warps, piece = plan.bwd_config.channels_per_thread, plan.bwd_config.warps, plan.bwd_config.subtile
    threads, width, groups = 32 * warps, plan.bwd_config.channels, plan.padded_states // 16
    held, mixes = (TILE // piece - 1) * K * groups * threads * 16, -(-TILE // (threads // (plan.padded_states // 2)))
    staged = TILE * (width * 16 + 2 * plan.padded_states * 4)
    fetched = (5 * K + mixes) * threads * 4 * size + K * groups * threads * 16
    return staged + held + 2 * TILE * width * 4 + TILE * warps * 2 * plan.padded_states * 4 + fetched


def _wide(u: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=u.device)


def _arguments(s: Streams) -> tuple[Any, ...]:
    """STREAM_PARAMS of common.cu."""
    z = (None, 0, 0) if s.z is None else (s.z, *_steps(s.z))
    read = [v for pair in (s.u, s.delta) for v in (*_both(pair), *_steps(pair[0]))]
    mix = [v for pair in (s.B, s.C) for v in (*_both(pair), *_steps(pair[0]))]
    return (*read, *z, *mix, *_both(s.A), *_both(s.D), *_both(s.bias))


def _steps(x: Tensor) -> tuple[int, int]:
    """Elements from clip to clip and from token to token."""
    return x.stride(0), x.stride(1)


def _both(pair: Sequence[Any]) -> tuple[Any, Any]:
    return pair[0], pair[-1]


def _module(s: Streams, plan: ScanSchedule, keep: bool, *others: Tensor | None) -> Any:
    E, N = s.sizes[2:]
    tokens = [x for x in (*s.u, *s.delta, s.z, *others) if x is not None]
    vectorized = E % 4 == 0 and all(map(_aligned, tokens))
    vectorized_bc = N % 4 == 0 and all(map(_aligned, (*s.B, *s.C)))
    widest = max(plan.fwd_config.channels, plan.bwd_config.channels)
    macros = defines(
        io_dtype=s.u[0].dtype, schedule=plan, directions=len(s.reverses),
        vectorized=vectorized, vectorized_bc=vectorized_bc,
        no_padding=vectorized and vectorized_bc and N == plan.padded_states and E % widest == 0,
        softplus=int(s.softplus), has_z=s.z is not None, store_tile_states=keep,
    )  # fmt: skip
    return nvrtc.module(source(keep), macros, s.u[0].device)


def _aligned(x: Tensor) -> bool:
    """Whether groups of four elements can be read at once."""
    return x.stride(0) % 4 == 0 and x.stride(1) % 4 == 0 and x.data_ptr() % (4 * x.element_size()) == 0
