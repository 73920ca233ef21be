"""The schedule of the selective scan: which block scans which tokens, and which sequences are split.

A sequence is the unit that is scanned token by token: the channels of one block in one clip (and, in the backward, in one
direction). A sequence that is not split has one block. With split-L a sequence is cut into splits with a block each. Each split
then needs its initial state, which a state-only pass over the earlier splits computes.
"""

import functools
import math
from typing import NamedTuple

import torch

TILE = 16  # tokens that a block stages in shared memory at a time; tile_states are that far apart
MIN_TILES_PER_SPLIT = 8
MAX_SPLITS = 64
# The cost model of `_cost`, fitted to launches on an H200. Unit: one tile of one block.
UTILISATION = (0.67, 0.765, 1.0)  # share of its throughput that a multiprocessor has with 1/3, 2/3, all of its blocks
PARTIAL_WAVE = 0.72  # share of the lost throughput that a partial wave costs after one full wave; less after more
SPLIT_START = 0.75  # tiles that every block could scan before the blocks of the splits begin
COMBINE = 0.1  # tiles that combining the state of one earlier split takes
SPLIT_END = 0.1  # share of a split's tiles by which the last blocks finish late
UNEVEN_WAVE = 1.4  # factor for a single wave of one-warp blocks that fills all slots: a scheduler may get one warp too many
FILL = 0.98  # share of a GPU's blocks that a wave of splits takes at most, where state passes sum by moments
MOMENTS_FROM = 8192  # tokens: a clip of 1,569 took 6 % longer with moments, one of 9,409 6 % less
FEWEST_SPLITS = 5  # of a sequence, in one wave; below, schedules of several waves are better
MIXED_BLOCKS = 1.03  # factor for multi-warp blocks where unsplit sequences and splits run at the same time


class KernelConfig(NamedTuple):
    """The sizes with which a kernel is compiled. The unit of cost is a tile of the pass that makes outputs."""

    channels_per_thread: int
    warps: int  # of a direction
    min_blocks_per_sm: int = 1  # by which the compiler limits registers
    state_pass_cost: float = 0.6  # of a tile of the state-only pass
    subtile: int = 4  # tokens that the backward keeps in registers

    @property
    def channels(self) -> int:
        """Return the channels of a block."""
        return 8 * self.channels_per_thread * self.warps


class SplitSchedule(NamedTuple):
    """The first `num_unsplit` sequences are not split, the others have `num_splits` splits of `tiles_per_split` tiles."""

    num_sequences: int
    num_unsplit: int
    num_splits: int
    tiles_per_split: int

    @property
    def num_blocks(self) -> int:
        """Return the number of blocks of the pass that makes outputs."""
        return self.num_unsplit + (self.num_sequences - self.num_unsplit) * self.num_splits

    @property
    def num_state_passes(self) -> int:
        """Return the number of blocks of the state-only pass. A sequence's last split has none: no split follows it."""
        return (self.num_sequences - self.num_unsplit) * (self.num_splits - 1)


class ScanSchedule(NamedTuple):
    """The sizes with which the kernels are compiled, and how they share out a scan."""

    padded_states: int  # N, rounded up to a multiple of 16
    fwd_config: KernelConfig
    bwd_config: KernelConfig
    fwd_schedule: SplitSchedule
    bwd_schedule: SplitSchedule
    widest_block: int  # channels of a block of forward or backward, whichever has more
    moments_schedule: SplitSchedule | None  # of a forward whose state passes sum by moments; None where that is no gain


def kernel_configs(N: int) -> tuple[KernelConfig, KernelConfig]:
    """Return the configs of forward and backward for N states, the fastest on an H200 for N <= 16.

    With more states a thread has registers for one channel.
    """
    if N <= 16:
        return KernelConfig(2, 1, 6), KernelConfig(2, 4, 3, 0.3)
    return KernelConfig(1, 4), KernelConfig(1, 4, state_pass_cost=0.3)


@functools.lru_cache(1024)
def make_schedule(
    B: int, L: int, E: int, N: int, directions: int, processors: int, num_splits: int = 0, batch_invariant: bool = False
) -> ScanSchedule:
    """Return the schedule that takes the least time on a GPU with `processors` multiprocessors.

    `num_splits` forces that many splits of every sequence. With `batch_invariant` the splits do not depend on B.
    """
    fwd_config, bwd_config = kernel_configs(N)
    tiles = max(1, -(-L // TILE))
    if directions == 1:  # a block has half the warps
        fwd_config = fwd_config._replace(min_blocks_per_sm=2 * fwd_config.min_blocks_per_sm)
    fwd_sequences, bwd_sequences = -(-E // fwd_config.channels), -(-E // bwd_config.channels) * directions  # of a clip

    def split(sequences: int, config: KernelConfig) -> SplitSchedule:
        return _cheapest_split(sequences, B, tiles, processors, num_splits, batch_invariant, config)

    fwd_schedule, bwd_schedule = split(fwd_sequences, fwd_config), split(bwd_sequences, bwd_config)
    widest_block = max(fwd_config.channels, bwd_config.channels)
    moments = _schedule_of_moments(fwd_sequences, B, tiles, processors, batch_invariant, fwd_config, fwd_schedule, num_splits)
    return ScanSchedule(-(-N // 16) * 16, fwd_config, bwd_config, fwd_schedule, bwd_schedule, widest_block, moments)


def _schedule_of_moments(
    per_clip: int, clips: int, tiles: int, processors: int, batch_invariant: bool, config: KernelConfig, exact: SplitSchedule,
    forced: int,
) -> SplitSchedule | None:  # fmt: skip
    """Return the schedule of state passes by moments: about one wave of splits, as long as there are FEWEST_SPLITS or more.

    These state passes are so short that few splits are best, just too few to fill the GPU: 10 of 72 sequences on an H200, where
    11 fill it and take a quarter longer. With fewer splits it is the `exact` schedule, if that splits every sequence.
    """
    if tiles * TILE < MOMENTS_FROM and not forced:
        return None
    sequences = max(1, per_clip * (1 if batch_invariant else clips))
    n = min(int(FILL * processors * config.min_blocks_per_sm) // sequences, tiles // MIN_TILES_PER_SPLIT, MAX_SPLITS)
    if forced or n < FEWEST_SPLITS:
        return None if exact.num_unsplit else exact
    tiles_per_split = -(-tiles // n)
    return SplitSchedule(max(1, per_clip * clips), 0, -(-tiles // tiles_per_split), tiles_per_split)


def _cheapest_split(
    per_clip: int, clips: int, tiles: int, processors: int, num_splits: int, batch_invariant: bool, config: KernelConfig
) -> SplitSchedule:
    """Return the cheapest SplitSchedule of `per_clip` sequences of `tiles` tiles in each of `clips` clips."""
    sequences = max(1, per_clip * (1 if batch_invariant else clips))
    max_splits = max(1, min(tiles // MIN_TILES_PER_SPLIT, MAX_SPLITS))
    if num_splits:
        options = [(0, min(num_splits, max_splits))]
    else:  # unsplit: none, or as many as fill whole waves of all processors; the rest are split
        unsplit = {0} if batch_invariant else {0, sequences // processors * processors}
        options = [(sequences, 1)] + [(u, n) for u in unsplit if u < sequences for n in range(2, max_splits + 1)]
    num_unsplit, n = min(options, key=lambda option: _cost(option[0], option[1], sequences, tiles, processors, config))
    tiles_per_split = -(-tiles // n)
    num_sequences = max(1, per_clip * clips)
    return SplitSchedule(num_sequences, num_sequences if n == 1 else num_unsplit, -(-tiles // tiles_per_split), tiles_per_split)


def _cost(num_unsplit: int, num_splits: int, sequences: int, tiles: int, processors: int, config: KernelConfig) -> float:
    """Return the time of the busiest multiprocessor, in tiles that it could scan in that time at full throughput.

    Over 133 launches on an H200, the cheapest schedule by this model takes 0.5 % longer than the fastest one on average, and
    10 % longer at worst.
    """
    tiles_per_split = -(-tiles // num_splits)
    num_splits = -(-tiles // tiles_per_split)
    num_split = sequences - num_unsplit
    unsplit, splits = -(-num_unsplit // processors), num_split * num_splits / processors  # blocks of a multiprocessor
    slots = config.min_blocks_per_sm

    def cost_per_tile(blocks: int | float) -> float:
        """Return the cost of a tile of each of a multiprocessor's blocks: a third of the slots gives every scheduler a warp."""
        third = -(-3 * math.ceil(blocks) // slots)
        return third * slots / 3 / UTILISATION[third - 1] if third else 0.0

    def cost_of_waves(blocks: int | float, length: int) -> float:
        """Return the cost of blocks of one length: full waves, and a partial one that begins as the full ones end."""
        waves, partial = divmod(blocks, slots)
        lost_tiles = cost_per_tile(partial) - partial
        return (length + 1) * (blocks + (lost_tiles * PARTIAL_WAVE / waves if waves else lost_tiles))

    if num_splits == 1:
        return cost_of_waves(sequences / processors, tiles)
    concurrent = unsplit % slots  # unsplit sequences that are scanned at the same time as the splits
    cost = cost_of_waves(unsplit - concurrent, tiles)
    if not concurrent:
        cost += cost_of_waves(splits, tiles_per_split)
        if config.warps == 1 and not num_unsplit and 0.99 * slots < splits <= slots:
            cost *= UNEVEN_WAVE
    elif concurrent + splits <= slots:
        cost += (tiles_per_split + 1) * cost_per_tile(concurrent + splits)
        cost += (tiles - tiles_per_split) * cost_per_tile(concurrent)
    else:  # splits follow one another in the slots that the unsplit sequences leave
        length = (tiles_per_split + 1) * splits / (slots - concurrent)
        if length < tiles:
            cost += length * slots + (tiles - length) * cost_per_tile(concurrent)
        else:
            cost += (tiles_per_split + 1) * splits + tiles * concurrent
    if concurrent and config.warps > 1:
        cost *= MIXED_BLOCKS
    state_passing = SPLIT_START + COMBINE * (num_splits - 1) / 2 * math.ceil(splits / slots) + SPLIT_END * tiles_per_split
    state_passes = cost_of_waves(num_split * (num_splits - 1) / processors, tiles_per_split)
    return cost + config.state_pass_cost * state_passes + state_passing * slots


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Return a GPU's streaming multiprocessors; a CPU, which only emulates, has one."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
