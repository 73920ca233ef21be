"""How the selective scan is shared out among a GPU's multiprocessors: what a block walks, and where chains are cut."""

import functools
import math
from typing import NamedTuple

import torch

TILE = 16  # tokens; marks, the states from which the backward starts again, are that far apart
SHORTEST = 8  # tiles of a piece
# What a launch takes, fitted to an H200 (_cost):
BUSY = (0.67, 0.765, 1.0)  # what a multiprocessor does of what it can, with a third of its blocks, two, all
LAST = 0.72  # of what a last round that is not full would lose so, behind one full round; behind more so much less
START = 0.75  # tiles that every block could walk while pieces of time begin to be walked,
COMBINE = 0.1  # while it is told what one piece before leaves,
END = 0.1  # and, of a piece, while the last ones end
UNEVEN = 1.4  # a single round of small blocks in all places: they begin where others end, and a scheduler may get a warp more
BESIDE = 1.03  # large blocks of pieces beside whole chains


class Shape(NamedTuple):
    """Channels a thread and warps a direction; a block has 8 * channels * warps channels, and a multiprocessor holds `blocks`
    at least, by which the compiler counts registers. `piece` tokens stay in the registers of the backward. `again` is the cost
    of a tile in the pass over the states alone."""

    channels: int
    warps: int
    blocks: int = 1
    again: float = 0.6
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
    return (Shape(2, 1, 6), Shape(2, 4, 3, 0.3)) if N <= 16 else (Shape(1, 4), Shape(1, 4, again=0.3))


@functools.lru_cache(1024)
def plan(B: int, L: int, E: int, N: int, directions: int, processors: int, pieces: int = 0, invariant: bool = False) -> Plan:
    """What takes the least time on so many `processors`, or `pieces` of every chain. `invariant`: the same for every B."""
    forward, backward = shapes(N)
    tiles = max(1, -(-L // TILE))
    if directions == 1:  # blocks of half the size
        forward = forward._replace(blocks=2 * forward.blocks)
    ahead, back = -(-E // forward.width), -(-E // backward.width) * directions  # chains of a clip

    def cut(count: int, shape: Shape) -> Cut:
        return _cut(count, B, tiles, processors, pieces, invariant, shape)

    return Plan(-(-N // 16) * 16, forward, backward, cut(ahead, forward), cut(back, backward))


def _cut(count: int, clips: int, tiles: int, processors: int, pieces: int, invariant: bool, shape: Shape) -> Cut:
    chains = max(1, count * (1 if invariant else clips))
    most = max(1, min(tiles // SHORTEST, 64))
    if pieces:
        options = [(0, min(pieces, most))]
    else:  # whole rounds of all processors, none or as many as there are, and the rest in pieces
        rounds = {0} if invariant else {0, chains // processors * processors}
        options = [(chains, 1)] + [(whole, n) for whole in rounds if whole < chains for n in range(2, most + 1)]
    whole, n = min(options, key=lambda option: _cost(option[0], option[1], chains, tiles, processors, shape))
    span = -(-tiles // n)
    every = max(1, count * clips)
    return Cut(every, every if n == 1 else whole, -(-tiles // span), span)


def _cost(whole: int, pieces: int, chains: int, tiles: int, processors: int, shape: Shape) -> float:
    """Tiles that the busiest processor could walk at its best in the time that it needs. Of 133 launches on an H200 what it
    chooses takes 0.5 % longer than the best on average, 10 % at worst."""
    span = -(-tiles // pieces)
    pieces = -(-tiles // span)
    rest = chains - whole
    long, short = -(-whole // processors), rest * pieces / processors
    slots = shape.blocks

    def together(units: int | float) -> float:
        """A tile of each of a processor's blocks: a third of the slots gives every scheduler a warp, another third a second."""
        third = -(-3 * math.ceil(units) // slots)
        return third * slots / 3 / BUSY[third - 1] if third else 0.0

    def alone(units: int | float, length: int) -> float:
        """A processor's blocks of one length: full rounds, and one that is not, begun when the first of a full one end."""
        rounds, last = divmod(units, slots)
        lost = together(last) - last
        return (length + 1) * (units + (lost * LAST / rounds if rounds else lost))

    if pieces == 1:
        return alone(chains / processors, tiles)
    beside = long % slots
    walk = alone(long - beside, tiles)
    if not beside:
        walk += alone(short, span)
        if shape.warps == 1 and not whole and 0.99 * slots < short <= slots:
            walk *= UNEVEN
    elif beside + short <= slots:
        walk += (span + 1) * together(beside + short) + (tiles - span) * together(beside)
    else:  # one after another in the places that the long ones leave
        turns = (span + 1) * short / (slots - beside)
        walk += turns * slots + (tiles - turns) * together(beside) if turns < tiles else (span + 1) * short + tiles * beside
    if beside and shape.warps > 1:
        walk *= BESIDE
    between = START + COMBINE * (pieces - 1) / 2 * math.ceil(short / slots) + END * span
    return walk + shape.again * alone(rest * (pieces - 1) / processors, span) + between * slots


@functools.cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors; a CPU, which only emulates, has one."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
