"""Launches of the scan's kernels, without autograd.

Inputs have one entry a direction: a scan from the first token, one from the last, or both at once over the same tokens
(`ScanInputs.reverses`). Two directions share z: out = (y_first + y_second) * silu(z).
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused.ops.selective_scan import schedule
from fused.ops.selective_scan.inputs import (
    ScanInputs,
    compiled_module,
    flags_of,
    has_moments,
    input_arguments,
    query_arguments,
)
from fused.ops.selective_scan.kernel_source import BY_MOMENTS, STATES_ONLY, mixer_programs, source
from fused.ops.selective_scan.schedule import TILE, ScanSchedule, SplitSchedule
from fused.ops.selective_scan.state_passing import NO_STATE_PASSING, StatePassing, state_passing, work_counters
from fused.runtime import nvrtc
from fused.runtime.recording import launch_cuda

MAX_STATES = 64


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
        by_moments = has_moments(s, plan)
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
        passing = state_passing(splits, u, d, N, d * plan.fwd_config.warps, wanted, exit_channels)
    if passing.num_state_passes:
        split_initial_states = _float32(u, d, B, splits.num_splits, E, N)
    arguments = (
        initial_states, split_initial_states, *passing[:4], final_states, tile_states, y, y_pre_gate, y_other_direction,
        passing.work_counters, passing.num_state_passes, passing.unsplit_per_scheduler,
        *query_arguments(s), B, L, E, N, splits.tiles_per_split, splits.num_splits, splits.num_unsplit,
        flags_of(s) | BY_MOMENTS * by_moments,
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
        final_states, None, u, None, None, work_counters(u, splits.num_sequences), passes, 0,
        *query_arguments(s), B, L, E, N, splits.tiles_per_split, n, 0, flags_of(s) | STATES_ONLY,
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
    module, inputs = compiled_module("backward", s, plan, True, dy, dz), input_arguments(s)
    blocks, row_width = -(-E // config.channels), -(-E * (N + 2) // 4) * 4
    dBC_parts = _float32(u, d, B, L, blocks, 2, plan.padded_states)  # of each block of channels
    dA_dD_dbias_parts = _float32(u, d, B * splits.num_splits, row_width)  # of each clip and split
    is_split = splits.num_unsplit < splits.num_sequences
    passing = state_passing(splits, u, d, N, config.warps, True) if is_split else NO_STATE_PASSING
    sizes = (B, L, E, N, splits.tiles_per_split, splits.num_splits, splits.num_unsplit, flags_of(s))
    arguments = (
        dy, dy.stride(0), dy.stride(1), y_pre_gate, tile_states, dfinal_states,
        passing.split_final_states, passing.delta_sums, du[0], du[-1], ddelta[0], ddelta[-1],
        *((None, 0, 0) if dz is None else (dz, dz.stride(0), dz.stride(1))), dBC_parts, dA_dD_dbias_parts, dinitial_states,
        passing.work_counters, passing.num_state_passes, passing.unsplit_per_scheduler, *query_arguments(s),
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
    module = compiled_module("forward", s, plan, keep, y_other_direction)
    launch_cuda(module, "scan_forward", (blocks, 1, 1), threads, shared, *input_arguments(s), *arguments)


@functools.lru_cache(1024)
def _forward_block(plan: ScanSchedule, directions: int) -> tuple[int, int]:
    """Return the threads and the bytes of shared memory of a block: staged inputs and y."""
    channels = plan.fwd_config.channels
    shared = directions * TILE * (channels * 8 + 2 * plan.padded_states * 4 + (channels + 8) * 4)
    return directions * 32 * plan.fwd_config.warps, shared


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
