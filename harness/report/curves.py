"""Speeds as curves over the length of a clip, and where two of them meet."""

import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from harness.bench import grids
from harness.records import interval
from harness.records.speed import Entry, Speed
from harness.report import words
from harness.report.faults import MARKED

MAMBA, VIT = "videomamba", "vit"
ENDED = ("oom", "timeout")


@dataclass(frozen=True)
class Curve:
    """The speeds of one entry run in one way, short clips first."""

    entry: Entry
    way: str
    speeds: tuple[Speed, ...]

    @property
    def timed(self) -> list[Speed]:
        """Return the points with a speed."""
        return [s for s in self.speeds if s.seconds]

    @property
    def ended(self) -> Speed | None:
        """Return the first point that ran out of memory or time."""
        return next((s for s in self.speeds if s.status in ENDED), None)


@dataclass(frozen=True)
class Family:
    """Curves of one plot: models of one race, in one mode and dtype, on clips of one batch and picture size, or on tokens."""

    race: str
    dims: tuple[tuple[str, int], ...]
    mode: str
    dtype: str
    curves: tuple[Curve, ...]

    @property
    def stem(self) -> str:
        """Return its plot's file name."""
        return "-".join(["models", self.mode, self.race, *(f"{k}{v}" for k, v in self.dims), self.dtype])

    @property
    def title(self) -> str:
        """Return the models and the clips."""
        sizes = dict(self.dims)
        clips = f"{sizes['S']} px" if "S" in sizes else "tokens without a class token"
        return f"{race_title(self.race)}, {words.MODES[self.mode]}: batch {sizes['B']}, {clips}, {self.dtype}"

    @property
    def ways(self) -> list[str]:
        """Return the ways in which its models are run."""
        return list(dict.fromkeys(c.way for c in self.curves))

    @property
    def main_way(self) -> str:
        """Return the way in which they are compared first: CUDA graphs where they were timed so."""
        return "graph" if "graph" in self.ways else self.ways[0]

    def of(self, subject: str) -> list[Curve]:
        """Return the curves of a subject that have a speed somewhere."""
        return [c for c in self.curves if c.entry.subject == subject and c.timed]

    def name(self, curve: Curve) -> str:
        """Return the entry, and its way where there is more than one."""
        return curve.entry.name + f" ({curve.way})" * (len(self.ways) > 1)

    def fastest_vit(self, way: str) -> dict[int, Speed]:
        """Return the fastest ViT at each length, run in one way."""
        found: dict[int, list[Speed]] = {}
        for speed in (s for c in self.of(VIT) if c.way == way for s in c.timed):
            found.setdefault(speed.point["L"], []).append(speed)
        return {length: min(speeds, key=seconds) for length, speeds in sorted(found.items())}


@dataclass(frozen=True)
class Meeting:
    """A VideoMamba's times over the fastest ViT's; `at` is the number of tokens where the ratio is 1, None if nowhere."""

    lengths: tuple[int, ...]
    ratios: tuple[float, ...]
    rivals: tuple[Speed, ...]
    at: float | None


def families(speeds: Iterable[Speed], clips: bool = True) -> list[Family]:
    """Return all families of clips with at least one curve of two points or more; without `clips`, those of tokens."""
    groups: dict[tuple[Any, ...], dict[tuple[Entry, str], list[Speed]]] = {}
    races = grids.races("models")
    for s in speeds:
        if s.point.race in races and s.point.clips == clips:
            race, *dims, mode, way, dtype = s.point.curve
            groups.setdefault((race, tuple(dims), mode, dtype), {}).setdefault((s.entry, way), []).append(s)
    found = []
    for key, group in groups.items():
        curves = [Curve(*who, tuple(sorted(mine, key=lambda s: s.point["L"]))) for who, mine in group.items()]
        if any(len(c.timed) > 1 for c in curves):
            race, dims, mode, dtype = key
            found.append(Family(race, dims, mode, dtype, tuple(curves)))
    return found


def meeting(family: Family, curve: Curve) -> Meeting:
    """Return where a VideoMamba meets the fastest ViT that is run in the same way."""
    vits = family.fastest_vit(curve.way)
    mine = {s.point["L"]: s for s in curve.timed}
    lengths = tuple(length for length in mine if length in vits)
    ours, theirs = ([seconds(speeds[n]) for n in lengths] for speeds in (mine, vits))
    ratios = tuple(a / b for a, b in zip(ours, theirs, strict=True))
    return Meeting(lengths, ratios, tuple(vits[n] for n in lengths), crossing(lengths, ours, theirs))


def crossing(xs: Sequence[float], a: Sequence[float], b: Sequence[float]) -> float | None:
    """Return the last x at which two curves over rising xs meet; None if they do not.

    Curves are straight between neighbouring points in logarithms. The last crossing holds for all beyond it.
    """
    gaps = [math.log(p / q) for p, q in zip(a, b, strict=True)]
    for i in reversed(range(len(gaps))):
        if gaps[i] == 0:
            return float(xs[i])
        if i and gaps[i - 1] * gaps[i] < 0:
            share = gaps[i - 1] / (gaps[i - 1] - gaps[i])
            return math.exp(math.log(xs[i - 1]) + share * math.log(xs[i] / xs[i - 1]))
    return None


@functools.cache
def median(samples: tuple[float, ...]) -> interval.Interval:
    """Return the median of samples and its interval; a page asks for the same ones many times."""
    return interval.median(samples)


def seconds(speed: Speed) -> float:
    """Return the median time of one call."""
    return median(speed.seconds).middle


def memory(speed: Speed) -> int | None:
    """Return the bytes at the peak of a call; None without a time."""
    return speed.allocated if speed.seconds else None


def race_title(race: str) -> str:
    """Return the title of a race: its two models."""
    _, (_, vit) = grids.races("models")[race].contenders
    return f"{words.race(race)} against {words.vit(vit)}"


def fault_note(speed: Speed) -> str:
    """Return the mark on the time of an entry whose answers were outside the budget, or were not judged; "" for others."""
    if speed.wrong > MARKED:
        return f"error {speed.wrong:.3g} times its budget"
    return f"not judged: {speed.reason}" if speed.seconds and speed.reason and not speed.wrong else ""
