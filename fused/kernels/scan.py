"""The selective scan's kernels: which are launched for what, on which pieces of time. No autograd here.

Everything comes once per direction: a walk from the first token, one from the last, or both at once over the same tokens
(`Streams.reverses`). Two directions share z: out = (y_first + y_second) * silu(z).
"""

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import nvrtc
from .device import Branch

FILL, FORK = False, True
TILE = 16  # tokens; marks, the states from which the backward starts again, are that far apart
SHORTEST = 8  # tiles of a piece
LONGEST_STATE = 64
FILES = ("device.cuh", "scan_common.cu", "scan_forward.cu", "scan_backward.cu")
IO = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
SOFTPLUS, LOGARITHM, REVERSE = 1, 2, 4


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
    softplus: bool = True
    logarithm: bool = False  # A holds log(-A)

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """B, L, E, N."""
        return (*self.u[0].shape, self.A[0].shape[1])

    @property
    def flags(self) -> int:
        """What the kernels must know at run time."""
        return SOFTPLUS * self.softplus + LOGARITHM * self.logarithm + REVERSE * self.reverses[0]


class Result(NamedTuple):
    """What `forward` leaves; what was not asked for is None. d directions."""

    y: Tensor  # (B, L, E)
    final: Tensor  # (d, B, E, N) float32
    starts: Tensor | None  # (d, B, pieces, E, N) float32: the state that enters every piece of a chain that is cut
    ungated: Tensor | None  # (B, L, E): y before the gate; y itself without one
    marks: Tensor | None  # (d, B, tiles, E, N) float32: the state before every tile


class Shape(NamedTuple):
    """Channels a thread and warps a direction; a block has 8 * channels * warps channels, and a multiprocessor holds `blocks`
    at least, by which the compiler counts registers. `piece` tokens stay in the registers of the backward. `again` is the cost
    of a tile in the pass over the states alone."""

    channels: int
    warps: int
    blocks: int = 1
    again: float = 0.75
    piece: int = 4

    @property
    def width(self) -> int:
        """Channels of a block."""
        return 8 * self.channels * self.warps


class Cut(NamedTuple):
    """How chains, each to be walked one token after another, are shared out: the first `whole` are not cut, the others into
    `pieces` of `span` tiles."""

    chains: int
    whole: int
    pieces: int
    span: int

    @property
    def units(self) -> int:
        """Blocks that walk."""
        return self.whole + (self.chains - self.whole) * self.pieces

    @property
    def passes(self) -> int:
        """Blocks of the pass for the states that enter the pieces: what leaves a chain's last piece enters none."""
        return (self.chains - self.whole) * (self.pieces - 1)


class Plan(NamedTuple):
    """How the kernels are built and how time is cut."""

    states: int  # N padded
    forward: Shape
    backward: Shape
    ahead: Cut
    back: Cut


def shapes(N: int) -> tuple[Shape, Shape]:
    """Measured best on an H200 for N <= 16; with more states a thread has registers for one channel."""
    return (Shape(2, 2, 4), Shape(2, 4, 3, 0.3)) if N <= 16 else (Shape(1, 4), Shape(1, 4, again=0.3))


@functools.lru_cache(1024)
def plan(B: int, L: int, E: int, N: int, directions: int, processors: int, pieces: int = 0, invariant: bool = False) -> Plan:
    """What takes the least time on so many `processors`, or `pieces` of every chain. `invariant`: the same for every B."""
    forward, backward = shapes(N)
    tiles = max(1, -(-L // TILE))
    counts = -(-E // forward.width), -(-E // backward.width) * directions  # chains of a clip
    cuts = [
        _cut(n, B, tiles, processors, pieces, invariant, shape) for n, shape in zip(counts, (forward, backward), strict=True)
    ]
    return Plan(-(-N // 16) * 16, forward, backward, *cuts)


def _cut(count: int, clips: int, tiles: int, processors: int, pieces: int, invariant: bool, shape: Shape) -> Cut:
    chains = max(1, count * (1 if invariant else clips))
    most = max(1, min(tiles // SHORTEST, 64))
    if pieces:
        options = [(0, min(pieces, most))]
    else:  # whole rounds of all processors, none or as many as there are, and the rest in pieces
        rounds = {0} if invariant else {0, chains // processors * processors}
        options = [(chains, 1)] + [(whole, n) for whole in rounds if whole < chains for n in range(2, most + 1)]
    whole, n = min(options, key=lambda option: _cost(*option, chains, tiles, processors, shape))
    span = -(-tiles // n)
    every = max(1, count * clips)
    return Cut(every, every if n == 1 else whole, -(-tiles // span), span)


BUSY = (0.52, 0.82, 0.94, 1.0)  # of its best, what a multiprocessor does with one, two, three or four blocks
LAUNCHES = 8  # tiles that could be walked while the kernels of the pass over the states start and end


def _cost(whole: int, pieces: int, chains: int, tiles: int, processors: int, shape: Shape) -> float:
    """Tiles that the busiest processor could walk at its best in the time that it needs. Fitted to an H200, within 10 %."""
    span = -(-tiles // pieces)
    pieces = -(-tiles // span)
    rest = chains - whole
    long, short, passes = (-(-n // processors) for n in (whole, rest * pieces, rest * (pieces - 1)))
    slots = shape.blocks

    def busy(units: int) -> float:
        return BUSY[units - 1] / BUSY[slots - 1]

    def alone(units: int, length: int) -> float:
        """Units of one length: full rounds, and one that is not."""
        last = units % slots
        return (length + 2) * (units - last + (last / busy(last) if last else 0))

    if pieces == 1 or whole == 0:
        walk = alone(short if pieces > 1 else -(-chains // processors), span)
    else:
        beside = long % slots
        if beside and beside + short > slots:
            return math.inf  # short ones that wait for one another leave the long ones alone at the end: measured slow
        both = beside + short
        walk = alone(long - beside, tiles) + (span + 2) * both / busy(both)
        walk += (tiles - span) * beside / busy(beside) if beside else 0
    return walk + (shape.again * alone(passes, span) + LAUNCHES if pieces > 1 else 0)


@functools.cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors; a CPU, which only emulates, has one."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@functools.cache
def source() -> str:
    """The kernels' CUDA C++."""
    return "\n".join((Path(__file__).parent / name).read_text(encoding="utf-8") for name in FILES)


def forward(
    s: Streams, initial: Tensor | None, plan: Plan, *, ungated: bool, marks: bool, starts: Tensor | None = None
) -> Result:
    """Scan from `initial` (B, E, N), one direction only, or from zero. `starts` of an earlier call saves the pass for them."""
    B, L, E, N = s.sizes
    u, d = s.u[0], len(s.reverses)
    y, final = u.new_empty((B, L, E)), _wide(u, d, B, E, N)
    before = torch.empty_like(y) if ungated and s.z is not None else None
    seen = _wide(u, d, B, -(-L // TILE), E, N) if marks else None
    if 0 in (B, L, E):
        final = final.zero_() if initial is None else final.copy_(initial)
        return Result(y, final, starts, before, seen)
    cut, scan = plan.ahead, functools.partial(_scan, s, plan)
    parted, local, sums = starts is None and cut.whole < cut.chains, None, None
    if parted:
        local, sums, starts = (_wide(u, d, B, cut.pieces, E, *n) for n in ((N,), (), (N,)))
    full = functools.partial(scan, "scan_full", initial, starts, final, None, seen, y, before)
    branch = Branch(u.device, FORK and parted and cut.whole > 0)  # chains that are whole need not wait for the states of the others
    if parted and cut.whole:
        full(first=0, units=cut.whole)
    with branch:
        if parted:
            if FILL: sums.zero_()
            scan("scan_states", None, None, local, sums, None, None, None, first=cut.whole, units=cut.passes)
            combine(s, plan, sums, local, initial, starts, clip0=cut.whole * B // cut.chains, adjoint=False)
        done = cut.whole if parted else 0
        full(first=done, units=cut.units - done)
    return Result(y, final, starts, y if s.z is None and ungated else before, seen)


def combine(
    s: Streams, plan: Plan, sums: Tensor, local: Tensor, initial: Tensor | None, enter: Tensor, *, clip0: int = 0, adjoint: bool
) -> None:
    """Carry states from piece to piece: `sums` (d, B, pieces, E) of delta and `local` (d, B, pieces, E, N), what leaves a piece
    that nothing enters, give what enters each, written into `enter`, from clip `clip0`. `adjoint` carries the other way. The
    same for pieces that lie on several devices."""
    d, B, pieces, E, N = local.shape
    args = (*_both(s.A), sums, local, initial, enter, B, clip0, E, N, pieces, s.flags, int(adjoint))
    _module(s, plan).launch("scan_combine", (-(-E * N // 128), B - clip0, d), 128, 0, *args)


class Gradients(NamedTuple):
    """What `backward` returns, per direction but for z; float32 for what is summed over clips and for the state."""

    u: tuple[Tensor, ...]  # (B, L, E)
    delta: tuple[Tensor, ...]  # (B, L, E)
    z: Tensor | None  # (B, L, E)
    A: Tensor  # (d, E, N); of A itself, also where A came as its logarithm
    D: Tensor  # (d, E)
    bias: Tensor  # (d, E)
    initial: Tensor  # (d, B, E, N)


def backward(
    s: Streams, dy: Tensor, dfinal: Tensor | None, marks: Tensor, ungated: Tensor | None, plan: Plan,
    dB: Sequence[Tensor], dC: Sequence[Tensor], du: Sequence[Tensor] = (), ddelta: Sequence[Tensor] = (),
    dz: Tensor | None = None,
) -> Gradients:  # fmt: skip
    """Gradients, given dy (B, L, E) with unit stride along E and dfinal (d, B, E, N) or None. Those of B and C are written
    into `dB` and `dC`, (B, L, N) each, of unit stride along N, and the others into contiguous `du` and `ddelta` and a `dz` of
    unit stride along E if these came."""
    B, L, E, N = s.sizes
    u, d, cut, shape = s.u[0], len(s.reverses), plan.back, plan.backward
    du, ddelta = (tuple(given) or tuple(u.new_empty((B, L, E)) for _ in range(d)) for given in (du, ddelta))
    if s.z is not None and dz is None:
        dz = u.new_empty((B, L, E))
    dinitial = _wide(u, d, B, E, N)
    if 0 in (B, L, E):
        zeros = _wide(u, d, E, N + 2).zero_()
        dinitial = dinitial.zero_() if dfinal is None else dinitial.copy_(dfinal)
        for x in (*dB, *dC):
            x.zero_()
        return Gradients(du, ddelta, dz, zeros[..., :N], zeros[..., N], zeros[..., N + 1], dinitial)
    module, arguments = _module(s, plan, dy, dz), _arguments(s)
    threads, shared = 32 * shape.warps, _shared_backward(plan, u.element_size())

    def launch(name: str, first: int, units: int, enter: Tensor | None, *rest: Any) -> None:
        sizes = (B, L, E, N, cut.span, cut.pieces, cut.whole, first, s.flags)
        given = (*arguments, dy, *_steps(dy), ungated, marks, dfinal, enter, *rest, *sizes)
        module.launch(name, (units, 1, 1), threads, shared, *given)

    blocks, width = -(-E // shape.width), -(-E * (N + 2) // 4) * 4
    parts = _wide(u, d, B, L, blocks, 2, plan.states)
    rows, total = _wide(u, d, B * cut.pieces, width), _wide(u, d, width)
    outputs = (None, None, *_both(du), *_both(ddelta), dz, *(_steps(dz) if dz is not None else (0, 0)), parts, rows, dinitial)
    parted, leave, sums, enter = cut.whole < cut.chains, None, None, None
    if parted:
        leave, sums, enter = (_wide(u, d, B, cut.pieces, E, *n) for n in ((N,), (), (N,)))
    branch = Branch(u.device, FORK and parted and cut.whole > 0)
    if cut.whole:
        launch("scan_backward_full", 0, cut.whole, enter, *outputs)
    with branch:
        if parted:
            if FILL: sums.zero_()
            nothing = (None, None, None, None, None, 0, 0, None, None, None)
            launch("scan_backward_states", cut.whole, cut.passes, None, leave, sums, *nothing)
            combine(s, plan, sums, leave, dfinal, enter, clip0=cut.whole * B // cut.chains, adjoint=True)
            launch("scan_backward_full", cut.whole, cut.units - cut.whole, enter, *outputs)
    args = (parts, *_both(dB), *_steps(dB[0]), *_both(dC), *_steps(dC[0]), L, N, blocks)
    module.launch("scan_sum_parts", (-(-L * 2 * plan.states // 256), B, d), 256, 0, *args)
    module.launch(
        "scan_sum_rows", (-(-width // 128), d, 1), 128, 0, rows, total, width, B, E, N, cut.pieces, cut.whole
    )  # fmt: skip
    A, D, bias = total[:, : E * (N + 2)].split((E * N, E, E), dim=1)
    return Gradients(du, ddelta, dz, A.view(d, E, N), D, bias, dinitial)


def _scan(s: Streams, plan: Plan, name: str, initial, enter, last, sums, marks, y, ungated, *, first: int, units: int) -> None:
    B, L, E, N = s.sizes
    shape, d, cut = plan.forward, len(s.reverses), plan.ahead
    shared = d * TILE * (shape.width * 8 + 2 * plan.states * 4 + (shape.width + 8) * 4)
    sizes = (B, L, E, N, cut.span, cut.pieces, cut.whole, first, s.flags)
    args = (*_arguments(s), initial, enter, last, sums, marks, y, ungated, *sizes)
    _module(s, plan).launch(name, (units, 1, 1), d * 32 * shape.warps, shared, *args)


def _shared_backward(plan: Plan, size: int) -> int:
    """Bytes of a block, `size` of an element: staged inputs, held states, results, sums, what is fetched ahead."""
    K, warps, piece = plan.backward.channels, plan.backward.warps, plan.backward.piece
    threads, width, groups = 32 * warps, plan.backward.width, plan.states // 16
    held, mixes = (TILE // piece - 1) * K * groups * threads * 16, -(-TILE // (threads // (plan.states // 2)))
    staged = TILE * (width * 16 + 2 * plan.states * 4)
    fetched = (5 * K + mixes) * threads * 4 * size + K * groups * threads * 16
    return staged + held + 2 * TILE * width * 4 + TILE * warps * 2 * plan.states * 4 + fetched


def _wide(u: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=u.device)


def _arguments(s: Streams) -> tuple[Any, ...]:
    """STREAMS of scan_forward.cu."""
    z = (None, 0, 0) if s.z is None else (s.z, *_steps(s.z))
    read = [v for pair in (s.u, s.delta) for v in (*_both(pair), *_steps(pair[0]))]
    mix = [v for pair in (s.B, s.C) for v in (*_both(pair), *_steps(pair[0]))]
    return (*read, *z, *mix, *_both(s.A), *_both(s.D), *_both(s.bias))


def _steps(x: Tensor) -> tuple[int, int]:
    """Elements from clip to clip and from token to token."""
    return x.stride(0), x.stride(1)


def _both(pair: Sequence[Any]) -> tuple[Any, Any]:
    return pair[0], pair[-1]


def defines(io: int, plan: Plan, directions: int, vector: int, vector_bc: int, exact: int) -> tuple[tuple[str, int], ...]:
    """What scan_common.cu says that the kernels are compiled with."""
    forward, backward = plan.forward, plan.backward
    return (
        ("IO", io), ("STATES", plan.states), ("VECTOR", vector), ("VECTOR_BC", vector_bc), ("EXACT", exact),
        ("DIRECTIONS", directions),
        ("FORWARD_CHANNELS", forward.channels), ("FORWARD_WARPS", forward.warps), ("FORWARD_BLOCKS", forward.blocks),
        ("BACKWARD_CHANNELS", backward.channels), ("BACKWARD_WARPS", backward.warps), ("BACKWARD_BLOCKS", backward.blocks),
        ("PIECE", backward.piece),
    )  # fmt: skip


def _module(s: Streams, plan: Plan, *others: Tensor | None) -> Any:
    E, N = s.sizes[2:]
    tokens = [x for x in (*s.u, *s.delta, s.z, *others) if x is not None]
    vector = int(E % 4 == 0 and all(map(_aligned, tokens)))
    vector_bc = int(N % 4 == 0 and all(map(_aligned, (*s.B, *s.C))))
    exact = int(vector and vector_bc and N == plan.states and E % max(plan.forward.width, plan.backward.width) == 0)
    chosen = defines(IO[s.u[0].dtype], plan, len(s.reverses), vector, vector_bc, exact)
    return nvrtc.module(source(), chosen, s.u[0].device)


def _aligned(x: Tensor) -> bool:
    """Whether groups of four elements can be read at once."""
    return x.stride(0) % 4 == 0 and x.stride(1) % 4 == 0 and x.data_ptr() % (4 * x.element_size()) == 0
