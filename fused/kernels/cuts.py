"""How the selective scan is shared out among a GPU's multiprocessors: what a block walks, and where chains are cut."""

import functools
import math
from typing import NamedTuple

import torch

TILE = 16  # tokens; marks, the states from which the backward starts again, are that far apart
SHORTEST = 8  # tiles of a piece
BUSY = (0.6, 0.83, 1.0)  # what a multiprocessor does of what it can, with a third of its blocks, two, all
START = 1.0  # tiles that every block could walk while pieces of time begin to be walked,
COMBINE = 0.1  # and while it is told what one piece before leaves
# Small blocks begin where others end, and a scheduler may get a warp more than another: so much is lost in a single round,
UNEVEN = 1.25
ROOM = 0.07  # unless at least so many of the places stay free


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
    """Tiles that the busiest processor could walk at its best in the time that it needs. Fitted to an H200: what it
    chooses takes 1 % longer than the best on average, 17 % at worst."""
    span = -(-tiles // pieces)
    pieces = -(-tiles // span)
    rest = chains - whole
    long, short, passes = (-(-n // processors) for n in (whole, rest * pieces, rest * (pieces - 1)))
    slots = shape.blocks

    def together(units: int) -> float:
        """A tile of each: a third of the slots gives every scheduler a warp, another third a second."""
        third = -(-3 * units // slots)
        return third * slots / 3 / BUSY[third - 1]

    def alone(units: int, length: int) -> float:
        """Units of one length: full rounds, and one that is not."""
        last = units % slots
        return (length + 1) * (units - last + (together(last) if last else 0))

    if pieces == 1:
        return alone(-(-chains // processors), tiles)
    beside = long % slots
    if beside and beside + short > slots:
        return math.inf  # short ones that wait for one another leave the long ones alone at the end: measured slow
    walk = alone(long - beside, tiles)
    if beside:
        walk += (span + 1) * together(beside + short) + (tiles - span) * together(beside)
    else:
        walk += alone(short, span)
    if shape.warps == 1 and short <= slots and not whole and rest * pieces > (1 - ROOM) * slots * processors:
        walk *= UNEVEN
    return walk + shape.again * alone(passes, span) + (START + COMBINE * (pieces - 1) / 2 * -(-short // slots)) * slots


@functools.cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors; a CPU, which only emulates, has one."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
