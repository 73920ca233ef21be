"""Launches of the scan's kernels, without autograd.

Inputs have one entry a direction: a scan from the first token, one from the last, or both at once over the same tokens
(`ScanInputs.reverses`). Two directions share z: out = (y_first + y_second) * silu(z).
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused.ops.selective_scan import schedule
from fused.ops.selective_scan.kernel_source import (
    A_LOG,
    BY_MOMENTS,
    REVERSE,
    SOFTPLUS_BY_CALLER,
    SOFTPLUS_IN_KERNEL,
    STATES_ONLY,
    defines,
    mixer_programs,
    num_work_counters,
    source,
)
from fused.ops.selective_scan.schedule import TILE, ScanSchedule, SplitSchedule
from fused.runtime import nvrtc
from fused.runtime.recording import launch_cuda

MAX_STATES = 64


class ScanInputs(NamedTuple):
    """The inputs of a scan, one entry a direction.

    u, delta, z (B, L, E) and B, C (B, L, N) have one dtype and unit stride along the last axis, and the two of a pair have the
    same strides. A (E, N), D and delta_bias (E,) are float32 and contiguous.
    """

    reverses: tuple[bool, ...]  # (False,), (True,) or (False, True)
    u: Sequence[Tensor]
    delta: Sequence[Tensor]
    A: Sequence[Tensor]
    B: Sequence[Tensor]
    C: Sequence[Tensor]
    D: Sequence[Tensor | None]
    delta_bias: Sequence[Tensor | None]
    z: Tensor | None
    softplus: int = SOFTPLUS_IN_KERNEL  # of delta; SOFTPLUS_BY_CALLER: the gradient is that of softplus's input
    A_is_log: bool = False  # A holds log(-A)
    tile_queries: Tensor | None = None  # of `query_rows`: z, y and their gradients are then (B, num_queries, E), and the
    num_queries: int = 0  # gradient of C is zero at other rows

    @property
    def y_shape(self) -> tuple[int, int, int]:
        """Return the shape of y."""
        B, L, E = self.u[0].shape
        return B, L if self.tile_queries is None else self.num_queries, E

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """Return (B, L, E, N)."""
        return (*self.u[0].shape, self.A[0].shape[1])

    @property
    def forward_direction(self) -> "ScanInputs":
        """Return the inputs of the first direction alone, without the gate."""
        pairs = (self.reverses, self.u, self.delta, self.A, self.B, self.C, self.D, self.delta_bias)
        one: Any = [pair[:1] for pair in pairs]
        settings: Any = (None, self.softplus, self.A_is_log)
        return ScanInputs(*one, *settings)


class Exits(NamedTuple):
    """The tiles and sequences that state passes of a launch have left out or done again, counted."""

    state_passes: int
    exited: int  # state passes, each direction of a block by itself, that have not read every tile
    rescanned: int  # sequences that were scanned again, since an exit was wrong


class StatePassing(NamedTuple):
    """The buffers of a launch that pass states from split to split, float32, and the work queue's counters."""

    split_final_states: Tensor | None  # (d, B, splits, E, N): the state that leaves a split if zero enters it
    delta_sums: Tensor | None  # (d, B, splits, E): over the tiles that the split's state pass has read
    unvisited_tiles: Tensor | None  # int32 (d, B, splits, blocks of channels): the tiles that it has not read, if it may exit
    exit_states: Tensor | None  # (d, B, splits, E, N): the true state where it has stopped
    work_counters: Tensor | None  # None where every sequence is alike
    num_state_passes: int  # 0 where the splits' initial states are known
    num_rescans: int
    unsplit_per_scheduler: int  # unsplit sequences for a multiprocessor's schedulers, as many of the four as a block has warps

    def exits(self) -> Exits:
        """Return how often a finished launch's state passes have exited. It waits for the GPU."""
        if self.unvisited_tiles is None or self.work_counters is None:
            return Exits(self.num_state_passes, 0, 0)
        wrong_exits = self.work_counters[-1 - self.num_rescans : -1]
        return Exits(self.num_state_passes, int((self.unvisited_tiles > 0).sum()), int((wrong_exits > 0).sum()))


NO_STATE_PASSING = StatePassing(None, None, None, None, None, 0, 0, 0)


class ScanOutputs(NamedTuple):
    """The results of `forward` over d directions; None for a result that was not asked for."""

    y: Tensor  # (B, L, E)
    final_states: Tensor  # (d, B, E, N) float32
    split_initial_states: Tensor | None  # (d, B, splits, E, N) float32: the state that enters every split of a split sequence
    y_pre_gate: Tensor | None  # (B, L, E): y before the gate; y itself without one
    tile_states: Tensor | None  # (d, B, tiles, E, N) float32: the state before every tile
    state_passing: StatePassing
    by_moments: bool  # whether state passes summed by moments


class ScanGradients(NamedTuple):
    """The results of `backward`, one entry a direction but for z; float32 where they are summed over clips, and for states."""

    u: Sequence[Tensor]  # (B, L, E)
    delta: Sequence[Tensor]  # (B, L, E)
    z: Tensor | None  # (B, L, E)
    A: Sequence[Tensor]  # (E, N); the gradient of A's logarithm with A_is_log
    D: Sequence[Tensor]  # (E,)
    delta_bias: Sequence[Tensor]  # (E,)
    initial_states: Tensor  # (d, B, E, N)


def schedule_for(u: Tensor, N: int | torch.SymInt, directions: int, batch_invariant: bool) -> ScanSchedule:
    """Return the schedule of a scan over u (B, L, E) with N states."""
    B, L, E = u.shape
    processors = schedule.multiprocessors(u.device)
    return schedule.make_schedule(int(B), int(L), int(E), int(N), directions, processors, batch_invariant=batch_invariant)


@functools.lru_cache(1024)
def start_compiling(
    B: int, L: int, E: int, N: int, directions: int, dtype: torch.dtype, device: torch.device, *, has_z: bool, training: bool,
    kept: bool = False,
) -> None:  # fmt: skip
    """Start compiling a mixer's programs (see `mixer_programs`) in background threads, once for these arguments.

    Called before the mixer's other kernels, it makes use of the time that their compilation takes.
    """
    plan = schedule.make_schedule(B, L, E, N, directions, schedule.multiprocessors(device))
    for name, macros in mixer_programs(plan, E, N, directions, dtype, has_z, training, kept):
        nvrtc.start(source(name), macros, device)


def dense(x: Tensor) -> Tensor:
    """Return x (..., channels) with unit stride along its last axis."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def aligned_or_none(x: Tensor | None) -> Tensor | None:
    """Return x contiguous and at an address where four float32 can be read at once; None for None."""
    if x is None:
        return None
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def forward(
    s: ScanInputs, initial_states: Tensor | None, plan: ScanSchedule, *, keep: bool,
    split_initial_states: Tensor | None = None, y_other_direction: Tensor | None = None, only_y: bool = False,
) -> ScanOutputs:  # fmt: skip
    """Scan from `initial_states` (d, B, E, N), of one direction (B, E, N), or from zero, and `keep` what the backward reads.

    With `only_y` states need not be more exact than y: bfloat16 state passes sum by moments where the kernel can (moments.cu).
    `split_initial_states` of an earlier call or of `state_pass` spares the state-only pass. `y_other_direction` (B, L, E),
    contiguous, is another direction's y, which one direction adds to its own before the gate.
    """
    u, d, splits = s.u[0], len(s.reverses), plan.fwd_schedule
    (B, L, E), N = u.shape, s.A[0].shape[1]
    by_moments = False
    if only_y and not keep and split_initial_states is None and y_other_direction is None:
        by_moments = _has_moments(s, plan)
        if by_moments and plan.moments_schedule is not None:
            splits = plan.moments_schedule
    y = torch.empty(s.y_shape, dtype=u.dtype, device=u.device)
    final_states = torch.empty((d, B, E, N), dtype=torch.float32, device=u.device)
    y_pre_gate = torch.empty_like(y) if keep and s.z is not None else None
    tile_states = _float32(u, d, B, -(-L // TILE), E, N) if keep else None
    if 0 in (B, L, E):
        final_states = final_states.zero_() if initial_states is None else final_states.copy_(initial_states)
        return ScanOutputs(y, final_states, split_initial_states, y_pre_gate, tile_states, NO_STATE_PASSING, False)
    passing = NO_STATE_PASSING
    if splits.num_unsplit < splits.num_sequences:
        wanted, exit_channels = split_initial_states is None, plan.fwd_config.channels * by_moments
        passing = _state_passing(splits, u, d, N, d * plan.fwd_config.warps, wanted, exit_channels)
    if passing.num_state_passes:
        split_initial_states = _float32(u, d, B, splits.num_splits, E, N)
    arguments = (
        initial_states, split_initial_states, *passing[:4], final_states, tile_states, y, y_pre_gate, y_other_direction,
        passing.work_counters, passing.num_state_passes, passing.unsplit_per_scheduler,
        *_query_arguments(s), B, L, E, N, splits.tiles_per_split, splits.num_splits, splits.num_unsplit,
        _flags(s) | BY_MOMENTS * by_moments,
    )  # fmt: skip
    blocks = splits.num_blocks + passing.num_state_passes + passing.num_rescans
    _launch_forward(s, plan, blocks, arguments, keep, y_other_direction)
    if keep and s.z is None:
        y_pre_gate = y
    return ScanOutputs(y, final_states, split_initial_states, y_pre_gate, tile_states, passing, by_moments)


def state_pass(
    s: ScanInputs, initial_states: Tensor | None, plan: ScanSchedule, splits: SplitSchedule
) -> tuple[Tensor, Tensor]:
    """Return the states (d, B, splits, E, N) that enter every split and the final states (d, B, E, N), float32, without any y.

    The scan starts from `initial_states` (d, B, E, N) or zero. Every sequence is split as `splits` says, those too that it
    leaves unsplit. C and z are not read.
    """
    B, L, E, N = s.sizes
    u, d, n = s.u[0], len(s.reverses), splits.num_splits
    split_initial_states, final_states = _float32(u, d, B, n, E, N), _float32(u, d, B, E, N)
    passes = splits.num_sequences * n
    arguments = (
        initial_states, split_initial_states, _float32(u, d, B, n, E, N), _float32(u, d, B, n, E), None, None,
        final_states, None, u, None, None, _work_counters(u, splits.num_sequences), passes, 0,
        *_query_arguments(s), B, L, E, N, splits.tiles_per_split, n, 0, _flags(s) | STATES_ONLY,
    )  # fmt: skip
    _launch_forward(s, plan, passes + splits.num_sequences * (n + 1), arguments)
    return split_initial_states, final_states


def backward(
    s: ScanInputs, dy: Tensor, dfinal_states: Tensor | None, tile_states: Tensor, y_pre_gate: Tensor | None,
    plan: ScanSchedule, dB: Sequence[Tensor], dC: Sequence[Tensor],
    du: Sequence[Tensor] | None = None, ddelta: Sequence[Tensor] | None = None, dz: Tensor | None = None,
) -> ScanGradients:  # fmt: skip
    """Return the gradients, given dy, like y, with unit stride along E and dfinal_states (d, B, E, N) or None.

    Those of B and C are written into `dB` and `dC`, (B, L, N) each, of unit stride along N; where they are given, those of u
    and delta into contiguous `du` and `ddelta` and that of z into a `dz` of unit stride along E.
    """
    B, L, E, N = s.sizes
    u, d, splits, config = s.u[0], len(s.reverses), plan.bwd_schedule, plan.bwd_config
    du = [u.new_empty((B, L, E)) for _ in range(d)] if du is None else du
    ddelta = [u.new_empty((B, L, E)) for _ in range(d)] if ddelta is None else ddelta
    if s.z is not None and dz is None:
        dz = u.new_empty(s.y_shape)
    dinitial_states = _float32(u, d, B, E, N)
    dA, dD, dbias = ([_float32(u, *shape) for _ in range(d)] for shape in ((E, N), (E,), (E,)))
    if 0 in (B, L, E):
        dinitial_states = dinitial_states.zero_() if dfinal_states is None else dinitial_states.copy_(dfinal_states)
        for x in (*dB, *dC, *dA, *dD, *dbias):
            x.zero_()
        return ScanGradients(du, ddelta, dz, dA, dD, dbias, dinitial_states)
    module, inputs = _module("backward", s, plan, True, dy, dz), _input_arguments(s)
    blocks, row_width = -(-E // config.channels), -(-E * (N + 2) // 4) * 4
    dBC_parts = _float32(u, d, B, L, blocks, 2, plan.padded_states)  # of each block of channels
    dA_dD_dbias_parts = _float32(u, d, B * splits.num_splits, row_width)  # of each clip and split
    is_split = splits.num_unsplit < splits.num_sequences
    passing = _state_passing(splits, u, d, N, config.warps, True) if is_split else NO_STATE_PASSING
    sizes = (B, L, E, N, splits.tiles_per_split, splits.num_splits, splits.num_unsplit, _flags(s))
    arguments = (
        dy, dy.stride(0), dy.stride(1), y_pre_gate, tile_states, dfinal_states,
        passing.split_final_states, passing.delta_sums, du[0], du[-1], ddelta[0], ddelta[-1],
        *((None, 0, 0) if dz is None else (dz, dz.stride(0), dz.stride(1))), dBC_parts, dA_dD_dbias_parts, dinitial_states,
        passing.work_counters, passing.num_state_passes, passing.unsplit_per_scheduler, *_query_arguments(s),
    )  # fmt: skip
    threads, shared = 32 * config.warps, _shared_bytes_backward(plan, u.element_size())
    grid = splits.num_blocks + passing.num_state_passes
    launch_cuda(module, "scan_backward", (grid, 1, 1), threads, shared, *inputs, *arguments, *sizes)
    outputs = (
        dBC_parts, dB[0], dB[-1], dB[0].stride(0), dB[0].stride(1), dC[0], dC[-1], dC[0].stride(0), dC[0].stride(1),
        dA_dD_dbias_parts, row_width, s.A[0], s.A[-1], dA[0], dA[-1], dD[0], dD[-1], dbias[0], dbias[-1],
    )  # fmt: skip
    grid = -(-L * 2 * plan.padded_states // 256) * B + -(-E * (N + 2) // 256)
    launch_cuda(module, "scan_backward_reduce", (grid, d, 1), 256, 0, *outputs, *sizes)
    return ScanGradients(du, ddelta, dz, dA, dD, dbias, dinitial_states)


def _launch_forward(
    s: ScanInputs, plan: ScanSchedule, blocks: int, arguments: tuple[Any, ...],
    keep: bool = False, y_other_direction: Tensor | None = None,
) -> None:  # fmt: skip
    threads, shared = _forward_block(plan, len(s.reverses))
    module = _module("forward", s, plan, keep, y_other_direction)
    launch_cuda(module, "scan_forward", (blocks, 1, 1), threads, shared, *_input_arguments(s), *arguments)


@functools.lru_cache(1024)
def _forward_block(plan: ScanSchedule, directions: int) -> tuple[int, int]:
    """Return the threads and the bytes of shared memory of a block: staged inputs and y."""
    channels = plan.fwd_config.channels
    shared = directions * TILE * (channels * 8 + 2 * plan.padded_states * 4 + (channels + 8) * 4)
    return directions * 32 * plan.fwd_config.warps, shared


def _work_counters(u: Tensor, num_split: int) -> Tensor:
    """Return the counters of a launch with so many split sequences, as WorkQueue in work.cu reads them."""
    return torch.zeros(num_work_counters(num_split), dtype=torch.int32, device=u.device)


def _state_passing(
    splits: SplitSchedule, u: Tensor, d: int, N: int, warps: int, wanted: bool, exit_channels: int = 0
) -> StatePassing:
    """Return the buffers of a launch with split sequences; without those of a state-only pass unless it is `wanted`.

    `exit_channels` are the channels of a block whose state passes may exit; 0 if they may not.
    """
    num_split = splits.num_sequences - splits.num_unsplit
    if not wanted and not splits.num_unsplit:
        return NO_STATE_PASSING
    B, _, E = u.shape
    schedulers = schedule.multiprocessors(u.device) * max(1, 4 // warps)
    unsplit_per_scheduler = -(-splits.num_unsplit // schedulers)
    if not wanted:
        return StatePassing(None, None, None, None, _work_counters(u, num_split), 0, 0, unsplit_per_scheduler)
    split_final_states = _float32(u, d, B, splits.num_splits, E, N)
    delta_sums = _float32(u, d, B, splits.num_splits, E)
    if not exit_channels:
        work = _work_counters(u, num_split)
        return StatePassing(split_final_states, delta_sums, None, None, work, splits.num_state_passes, 0, unsplit_per_scheduler)
    num_counters, shape = num_work_counters(num_split, True), (d, B, splits.num_splits, E // exit_channels)
    zeros = torch.zeros(num_counters + math.prod(shape), dtype=torch.int32, device=u.device)
    counters, unvisited = zeros.split((num_counters, math.prod(shape)))
    exit_states = torch.empty_like(split_final_states)
    return StatePassing(
        split_final_states, delta_sums, unvisited.view(shape), exit_states, counters, splits.num_state_passes, num_split,
        unsplit_per_scheduler,
    )  # fmt: skip


def _shared_bytes_backward(plan: ScanSchedule, element_size: int) -> int:
    """Return the shared memory of a block: staged inputs, states between subtiles, results, sums, and prefetched inputs."""
    config, states = plan.bwd_config, plan.padded_states
    K, warps, channels = config.channels_per_thread, config.warps, config.channels
    threads, groups = 32 * warps, states // 16
    subtile_states = (TILE // config.subtile - 1) * K * groups * threads * 16
    BC_loads = -(-TILE // (threads // (states // 2)))
    staged = TILE * (channels * 16 + 2 * states * 4)
    prefetched = (5 * K + BC_loads) * threads * 4 * element_size + K * groups * threads * 16
    return staged + subtile_states + 2 * TILE * channels * 4 + TILE * warps * 2 * states * 4 + prefetched


def _float32(u: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=u.device)


def _flags(s: ScanInputs) -> int:
    """Return the bits of the kernels' argument `flags`."""
    return A_LOG * s.A_is_log + REVERSE * s.reverses[0]


def _query_arguments(s: ScanInputs) -> tuple[Any, ...]:
    """Return the arguments of QUERY_PARAMS in common.cu."""
    return () if s.tile_queries is None else (s.tile_queries, s.num_queries)


def _input_arguments(s: ScanInputs) -> tuple[Any, ...]:
    """Return the kernels' first arguments, in the order of STREAM_PARAMS in common.cu."""
    u, delta, B, C, z = s.u, s.delta, s.B, s.C, s.z
    return (
        u[0], u[-1], u[0].stride(0), u[0].stride(1), delta[0], delta[-1], delta[0].stride(0), delta[0].stride(1),
        *((None, 0, 0) if z is None else (z, z.stride(0), z.stride(1))),
        B[0], B[-1], B[0].stride(0), B[0].stride(1), C[0], C[-1], C[0].stride(0), C[0].stride(1),
        s.A[0], s.A[-1], s.D[0], s.D[-1], s.delta_bias[0], s.delta_bias[-1],
    )  # fmt: skip


def _module(name: str, s: ScanInputs, plan: ScanSchedule, keep: bool, *others: Tensor | None) -> Any:
    """Return the compiled kernels of `source(name)` for these inputs; `others` (B, L, E) are also read or written."""
    E, N = s.u[0].shape[2], s.A[0].shape[1]
    vectorized = E % 4 == 0 and _readable(4, (*s.u, *s.delta, s.z, *others))
    vectorized_bc = N % 4 == 0 and _readable(4, (*s.B, *s.C))
    no_padding = vectorized and vectorized_bc and N == plan.padded_states and E % plan.widest_block == 0
    macros = defines(
        io_dtype=s.u[0].dtype, schedule=plan, directions=len(s.reverses),
        vectorized=vectorized, vectorized_bc=vectorized_bc, no_padding=no_padding,
        softplus=int(s.softplus), has_z=s.z is not None, store_tile_states=keep,
        query_rows=s.tile_queries is not None,
    )  # fmt: skip
    return nvrtc.module(source(name), macros, s.u[0].device)


def _readable(count: int, tensors: tuple[Tensor | None, ...]) -> bool:
    """Return whether groups of `count` elements can be read at once from each of the tensors (B, L, ...)."""
    for x in tensors:
        if x is not None and (x.stride(0) % count or x.stride(1) % count or x.data_ptr() % (count * x.element_size())):
            return False
    return True


def _has_moments(s: ScanInputs, plan: ScanSchedule) -> bool:
    """Return whether the schedule and the forward's program for these inputs have state passes by moments (HAS_MOMENTS)."""
    E, N, config, splits = s.u[0].shape[2], s.A[0].shape[1], plan.fwd_config, plan.moments_schedule
    if splits is None or splits.num_splits == 1 or 0 in s.u[0].shape:
        return False
    fits = N == 16 and E % plan.widest_block == 0 and config.warps == 1 and config.channels_per_thread == 2
    if not fits or s.u[0].dtype != torch.bfloat16 or s.softplus != SOFTPLUS_BY_CALLER:
        return False
    return _readable(4, (s.z, *s.C)) and _readable(8, (*s.u, *s.delta, *s.B))
