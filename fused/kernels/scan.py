"""The selective scan's kernels: which are launched for what, on which pieces of time. No autograd here.

Everything comes once per direction: a walk from the first token, one from the last, or both at once over the same tokens
(`Streams.reverses`). Two directions share z: out = (y_first + y_second) * silu(z).
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import nvrtc

TILE = 16  # tokens; marks, the states from which the backward starts again, are that far apart
SHORTEST = 8  # tiles of a split
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
    """What `forward` leaves; what was not asked for is None. d directions, S splits."""

    y: Tensor  # (B, L, E)
    final: Tensor  # (d, B, E, N) float32
    starts: Tensor | None  # (d, B, S, E, N) float32: the state that enters every split
    ungated: Tensor | None  # (B, L, E): y before the gate; y itself without one
    marks: Tensor | None  # (d, B, tiles, E, N) float32: the state before every tile


class Shape(NamedTuple):
    """Channels a thread and warps a direction; a block has 8 * channels * warps channels, and a multiprocessor holds `blocks`
    at least, by which the compiler counts registers. `piece` tokens stay in the registers of the backward."""

    channels: int
    warps: int
    blocks: int = 1
    piece: int = 4

    @property
    def width(self) -> int:
        """Channels of a block."""
        return 8 * self.channels * self.warps


class Plan(NamedTuple):
    """How the kernels are built and how time is cut."""

    states: int  # N padded
    forward: Shape
    backward: Shape
    splits: int
    span: int  # tokens of a split, a multiple of TILE


def shapes(N: int) -> tuple[Shape, Shape]:
    """Measured best on an H200 for N <= 16; with more states a thread has registers for one channel."""
    return (Shape(2, 2, 3), Shape(2, 4, 3)) if N <= 16 else (Shape(1, 4), Shape(1, 4))


def plan(B: int, L: int, E: int, N: int, directions: int, processors: int, splits: int = 0) -> Plan:
    """`splits` of time, or by default as many as take the least time on so many `processors`."""
    forward, backward = shapes(N)
    tiles = max(1, -(-L // TILE))
    blocks = max(1, -(-E // forward.width) * B * directions // 2)
    splits = splits or min(range(1, max(1, min(tiles // SHORTEST, 64)) + 1), key=lambda n: _cost(n, tiles, blocks, processors))
    span = -(-tiles // min(splits, max(1, tiles // SHORTEST)))
    return Plan(-(-N // 16) * 16, forward, backward, -(-tiles // span), span * TILE)


def _cost(splits: int, tiles: int, blocks: int, processors: int) -> float:
    """Tiles that the busiest processor walks one after another, in units of one block's. A processor that has several blocks
    divides its time among them; below three their waiting is not filled. Cut time costs a pass over the states."""
    span = -(-tiles // splits)
    most = max(3, -(-blocks * -(-tiles // span) // processors))
    return most * (span * (1.0 if span >= tiles else 1.6) + 2)


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
    u, d, S = s.u[0], len(s.reverses), plan.splits
    y, final = u.new_empty((B, L, E)), _wide(u, d, B, E, N)
    before = torch.empty_like(y) if ungated and s.z is not None else None
    seen = _wide(u, d, B, S * plan.span // TILE, E, N) if marks else None
    if 0 in (B, L, E):
        final = final.zero_() if initial is None else final.copy_(initial)
        return Result(y, final, starts, before, seen)
    if S > 1 and starts is None:
        starts = _starts(s, initial, plan)
    _scan("scan_full", s, plan, starts if S > 1 else initial, final, None, seen, y, before)
    return Result(y, final, starts, y if s.z is None and ungated else before, seen)


def states(s: Streams, initial: Tensor | None, plan: Plan, starts: Tensor | None = None) -> Tensor:
    """`Result.marks` alone."""
    B, L, E, N = s.sizes
    seen = _wide(s.u[0], len(s.reverses), B, plan.splits * plan.span // TILE, E, N)
    if 0 not in (B, L, E):
        starts = _starts(s, initial, plan) if plan.splits > 1 and starts is None else starts
        _scan("scan_states", s, plan, starts if plan.splits > 1 else initial, None, None, seen, None, None)
    return seen


def _starts(s: Streams, initial: Tensor | None, plan: Plan) -> Tensor:
    B, _, E, N = s.sizes
    u, shape = s.u[0], (len(s.reverses), B, plan.splits)
    local, sums = _wide(u, *shape, E, N), _wide(u, *shape, E)
    _scan("scan_states", s, plan, None, local, sums, None, None, None)
    return combine(s, plan, sums, local, initial, adjoint=False)[0]


def combine(
    s: Streams, plan: Plan, sums: Tensor, local: Tensor, initial: Tensor | None, *, adjoint: bool
) -> tuple[Tensor, Tensor]:
    """Carry states from split to split: `sums` (d, B, S, E) of delta and `local` (d, B, S, E, N), what leaves a split that
    nothing enters, give what enters each, and what leaves the last. The same for splits that lie on several devices."""
    enter, final = torch.empty_like(local), local.new_empty((*local.shape[:2], *local.shape[3:]))
    d, B, S, E, N = local.shape
    args = (*_both(s.A), sums, local, initial, enter, final, E, N, S, s.flags, int(adjoint))
    _module(s, plan).launch("scan_combine", (-(-E * N // 128), B, d), 128, 0, *args)
    return enter, final


class Gradients(NamedTuple):
    """What `backward` returns, per direction but for z; float32 for what is summed over clips and for the state."""

    u: tuple[Tensor, ...]  # (B, L, E)
    delta: tuple[Tensor, ...]  # (B, L, E)
    z: Tensor | None  # (B, L, E)
    gated: Tensor | None  # (B, L, E): y again, if asked for
    A: Tensor  # (d, E, N); of A itself, also where A came as its logarithm
    D: Tensor  # (d, E)
    bias: Tensor  # (d, E)
    initial: Tensor  # (d, B, E, N)


def backward(
    s: Streams, dy: Tensor, dfinal: Tensor | None, marks: Tensor, ungated: Tensor | None, plan: Plan,
    dB: Sequence[Tensor], dC: Sequence[Tensor], dz: Tensor | None = None, *, gated: bool = False,
) -> Gradients:  # fmt: skip
    """Gradients, given dy (B, L, E) with unit stride along E and dfinal (d, B, E, N) or None. Those of B and C are written
    into `dB` and `dC`, (B, L, N) each, of unit stride along N, and that of z into `dz` if it came."""
    B, L, E, N = s.sizes
    u, d, S, shape = s.u[0], len(s.reverses), plan.splits, plan.backward
    du, ddelta = (tuple(u.new_empty((B, L, E)) for _ in range(d)) for _ in range(2))
    if s.z is not None and dz is None:
        dz = u.new_empty((B, L, E))
    out = u.new_empty((B, L, E)) if gated and s.z is not None else None
    leave = _wide(u, d, B, S, E, N)
    if 0 in (B, L, E):
        zeros = _wide(u, d, E, N + 2).zero_()
        initial = _wide(u, d, B, E, N).zero_() if dfinal is None else dfinal.clone()
        for x in (*dB, *dC):
            x.zero_()
        return Gradients(du, ddelta, dz, out, zeros[..., :N], zeros[..., N], zeros[..., N + 1], initial)
    blocks = -(-E // shape.width)
    grid, threads = (blocks, S, B * d), 32 * shape.warps
    module, arguments = _module(s, plan, dy, dz), _arguments(s)
    sums = _wide(u, d, B, S, E if S > 1 else 0)

    def launch(name: str, shared: int, enter: Tensor | None, *rest: Any) -> None:
        module.launch(
            name, grid, threads, shared, *arguments, dy, *_steps(dy), ungated, marks, enter, leave, sums, *rest, *size
        )

    size, shared = (L, E, N, plan.span, s.flags), _shared_backward(plan, u.element_size())
    nothing = (None, None, None, None, None, 0, 0, None, None, None)
    enter, first = dfinal, None
    if S > 1:
        launch("scan_backward_states", shared, None, *nothing)
        enter, first = combine(s, plan, sums, leave, dfinal, adjoint=True)
    parts = _wide(u, d, B, L, blocks, 2, plan.states)
    width = -(-E * (N + 2) // 4) * 4
    rows, total = _wide(u, d, B * S, width), _wide(u, d, width)
    results = (*_both(du), *_both(ddelta), dz, *(_steps(dz) if dz is not None else (0, 0)), out, parts, rows)
    launch("scan_backward_full", shared, enter, *results)
    args = (parts, *_both(dB), *_steps(dB[0]), *_both(dC), *_steps(dC[0]), L, N, blocks)
    module.launch("scan_sum_parts", (-(-L * 2 * plan.states // 256), B, d), 256, 0, *args)
    module.launch("scan_sum_rows", (-(-width // 128), d, 1), 128, 0, rows, total, width, B * S)
    A, D, bias = total[:, : E * (N + 2)].split((E * N, E, E), dim=1)
    return Gradients(du, ddelta, dz, out, A.view(d, E, N), D, bias, leave[:, :, 0] if first is None else first)


def _scan(name: str, s: Streams, plan: Plan, start, last, sums, marks, y, ungated) -> None:
    B, L, E, N = s.sizes
    shape, d = plan.forward, len(s.reverses)
    shared = d * TILE * (shape.width * 8 + 2 * plan.states * 4 + (shape.width + 8) * 4)
    grid = (-(-E // shape.width), plan.splits, B)
    args = (*_arguments(s), start, last, sums, marks, y, ungated, L, E, N, plan.span, s.flags)
    _module(s, plan).launch(name, grid, d * 32 * shape.warps, shared, *args)


def _shared_backward(plan: Plan, size: int) -> int:
    """Bytes of a block, `size` of an element: staged inputs, held states, results, sums, what is fetched ahead."""
    K, warps, _, piece = plan.backward
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


def defines(io: int, plan: Plan, directions: int, vector: int, vector_bc: int) -> tuple[tuple[str, int], ...]:
    """What scan_common.cu says that the kernels are compiled with."""
    forward, backward = plan.forward, plan.backward
    return (
        ("IO", io), ("STATES", plan.states), ("VECTOR", vector), ("VECTOR_BC", vector_bc), ("DIRECTIONS", directions),
        ("FORWARD_CHANNELS", forward.channels), ("FORWARD_WARPS", forward.warps), ("FORWARD_BLOCKS", forward.blocks),
        ("BACKWARD_CHANNELS", backward.channels), ("BACKWARD_WARPS", backward.warps), ("BACKWARD_BLOCKS", backward.blocks),
        ("PIECE", backward.piece),
    )  # fmt: skip


def _module(s: Streams, plan: Plan, *others: Tensor | None) -> Any:
    E, N = s.sizes[2:]
    tokens = [x for x in (*s.u, *s.delta, s.z, *others) if x is not None]
    vector = int(E % 4 == 0 and all(map(_aligned, tokens)))
    vector_bc = int(N % 4 == 0 and all(map(_aligned, (*s.B, *s.C))))
    chosen = defines(IO[s.u[0].dtype], plan, len(s.reverses), vector, vector_bc)
    return nvrtc.module(source(), chosen, s.u[0].device)


def _aligned(x: Tensor) -> bool:
    """Whether groups of four elements can be read at once."""
    return x.stride(0) % 4 == 0 and x.stride(1) % 4 == 0 and x.data_ptr() % (4 * x.element_size()) == 0
