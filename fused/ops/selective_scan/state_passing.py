"""The memory of a launch by which states pass from split to split, and the counters of its work queue."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fused.ops.selective_scan import schedule
from fused.ops.selective_scan.kernel_source import num_work_counters
from fused.ops.selective_scan.schedule import SplitSchedule


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


def work_counters(u: Tensor, num_split: int) -> Tensor:
    """Return the counters of a launch with so many split sequences, as WorkQueue in work.cu reads them."""
    return torch.zeros(num_work_counters(num_split), dtype=torch.int32, device=u.device)


def state_passing(
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
        return StatePassing(None, None, None, None, work_counters(u, num_split), 0, 0, unsplit_per_scheduler)
    split_final_states = torch.empty((d, B, splits.num_splits, E, N), dtype=torch.float32, device=u.device)
    delta_sums = torch.empty((d, B, splits.num_splits, E), dtype=torch.float32, device=u.device)
    if not exit_channels:
        work = work_counters(u, num_split)
        return StatePassing(split_final_states, delta_sums, None, None, work, splits.num_state_passes, 0, unsplit_per_scheduler)
    num_counters, shape = num_work_counters(num_split, True), (d, B, splits.num_splits, E // exit_channels)
    zeros = torch.zeros(num_counters + math.prod(shape), dtype=torch.int32, device=u.device)
    counters, unvisited = zeros.split((num_counters, math.prod(shape)))
    exit_states = torch.empty_like(split_final_states)
    return StatePassing(
        split_final_states, delta_sums, unvisited.view(shape), exit_states, counters, splits.num_state_passes, num_split,
        unsplit_per_scheduler,
    )  # fmt: skip
