"""A point of a benchmark run, an entry that is timed there, and the result: one JSON line."""

import json
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from harness.records import interval
from harness.records.ceilings import WORDS
from harness.records.record import encode

STATUSES = ("ok", "oom", "timeout", "error", "gated", "implied")
MODES = {"infer": "forward, without gradients", "train": "forward, loss and backward; in race `loop` clipping and AdamW too"}
WAYS = {
    "eager": "one call after another", "graph": "replayed from a CUDA graph", "compiled": "torch.compile",
    "chunked": "`forward_chunked`, F frames at a time", "read": "a clip is read from a video file, by one thread of a CPU",
    "checkpointed": "eager; every mixer is run again in the backward",
    "reduce-overhead": "`torch.compile(mode=\"reduce-overhead\")`",
    "graphed": "the model by `torch.cuda.make_graphed_callables` in training, else by `fused.graphed` or one captured graph, "
    "inputs copied; the rest of a step is eager",
}  # fmt: skip
GPU_WAYS = ("graph", "graphed", "compiled", "reduce-overhead")  # those that need a GPU


@dataclass(frozen=True)
class Point:
    """Conditions under which rivals are timed together: sizes, mode and way; `race` is the name of a `Race`. A model's
    point with frames T and side S is of clips; one without is of tokens, which blocks and final norm take at any length. F are
    the frames of a chunk, A those that a stream has seen before the clock starts, G those from key frame to key frame of a
    file. D is the width, where the points of a race are of several models; of a ViT it is VideoMamba's beside it."""

    race: str
    dims: tuple[tuple[str, int], ...]
    mode: str
    way: str = "eager"
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        for field, value, allowed in (("mode", self.mode, MODES), ("way", self.way, WAYS)):
            if value not in allowed:
                raise ValueError(f"{field} is {value!r}; allowed are {', '.join(allowed)}")

    def __getitem__(self, letter: str) -> int:
        return dict(self.dims)[letter]

    @property
    def name(self) -> str:
        """Return the name; unique in a run."""
        return "-".join([self.race, *(f"{k}{v}" for k, v in self.dims), self.mode, self.way, self.dtype])

    @property
    def tokens(self) -> int:
        """Return the number of tokens of one call, over all clips."""
        return self["B"] * self["L"]

    @property
    def clips(self) -> bool:
        """Return whether the input of a model is clips, not tokens."""
        return "T" in dict(self.dims)

    @property
    def curve(self) -> tuple[Any, ...]:
        """Return the curve it lies on: everything but the length, so that a longer point needs more memory."""
        return (self.race, *((k, v) for k, v in self.dims if k not in "LT"), self.mode, self.way, self.dtype)


@dataclass(frozen=True)
class Entry:
    """An implementation of a subject, to be timed. `maker`, "module:function", builds its call in a worker process:
    maker(point, entry, device) -> `harness.bench.clock.Call`."""

    subject: str
    implementation: str
    role: str
    maker: str = "harness.bench.workloads:make"
    variant: str = ""  # the model's size

    @property
    def name(self) -> str:
        """Return the name in plots and tables; a reference that is timed is called naive."""
        label = "naive" if self.implementation == "reference" else self.implementation
        return " ".join(filter(None, [self.subject, self.variant, label]))


@dataclass(frozen=True)
class Speed:
    """The result of timing one entry at one point. `seconds` are the raw samples, of one call each."""

    entry: Entry
    point: Point
    status: str
    seconds: tuple[float, ...] = ()
    warm: tuple[float, ...] = ()  # the calls before, kept apart
    stopped: str = ""  # "interval" within 1 %, or "budget" spent
    alone: bool = False  # not interleaved with its rivals: they did not fit into the memory with it
    allocated: int = 0  # bytes at the peak of one call
    reserved: int = 0
    joules: float | None = None  # per call, pauses between samples included
    clock: float | None = None  # MHz of the multiprocessors, median over the batches of samples
    bound: float | None = None  # seconds that the hardware needs at least, by this run's ceilings
    bound_by: str = ""  # the field of `Ceilings` that most of the bound comes from
    bound_error: float = 0.0  # by how much of itself the bound may be too large, as the ceilings were measured
    wrong: float = 0.0  # a rival that failed its licence: its worst error in budgets
    reason: str = ""
    host: tuple[float, ...] = ()  # of a loop: seconds a layer until the last launch returned on an idle GPU, of the forward,
    # and in training of forward and backward; medians

    def __post_init__(self) -> None:
        if self.status not in STATUSES:
            raise ValueError(f"status is {self.status!r}; allowed are {', '.join(STATUSES)}")
        if (self.status == "ok") != bool(self.seconds):
            raise ValueError("a speed is ok exactly if it has samples")
        if self.status != "ok" and not self.reason:
            raise ValueError(f"a speed with status {self.status!r} says why")

    @property
    def key(self) -> tuple[str, str]:
        """Return the names of entry and point; unique in a run."""
        return self.entry.name, self.point.name

    @property
    def median(self) -> interval.Interval:
        """Return the seconds of a call."""
        return interval.median(self.seconds)

    @property
    def share(self) -> float | None:
        """Return the bound over the median time, at most 1; None without a time or a bound that is one."""
        if not self.bound or not self.seconds or self.no_bound:
            return None
        return min(1.0, self.bound / statistics.median(self.seconds))

    @property
    def no_bound(self) -> str:
        """Return why its bound is none: it was faster, by more than the ceilings' uncertainty. "" for a bound that holds."""
        times = self.bound / statistics.median(self.seconds) if self.bound and self.seconds else 0.0
        if times <= 1 + self.bound_error:
            return ""
        ceiling = f"the measured ceiling of {WORDS[self.bound_by]}" if self.bound_by else "the measured ceilings"
        return f"{times:.3g} times as fast as {ceiling} would allow"

    def to_line(self) -> str:
        """Return one line of strict JSON."""
        return json.dumps(encode(asdict(self)), allow_nan=False)

    @classmethod
    def parse(cls, text: str) -> "Speed":
        """Return the speed of a line that `to_line` wrote."""
        raw = json.loads(text)
        raw["entry"] = Entry(**raw["entry"])
        raw["point"] = Point(**raw["point"] | {"dims": tuple((k, v) for k, v in raw["point"]["dims"])})
        raw |= {k: tuple(raw[k]) for k in ("seconds", "warm", "host") if k in raw} | {"wrong": float(raw["wrong"])}
        return cls(**{f.name: raw[f.name] for f in fields(cls) if f.name in raw})  # older lines have fewer fields


def is_failure(speed: Speed) -> bool:
    """Return whether it fails the run: ours, and refused a time, in error, or out of time. Out of memory is a result."""
    return speed.entry.role == "ours" and speed.status in ("gated", "error", "timeout")


def last_line(speeds: Sequence[Speed]) -> str:
    """Return `N timed, N gated, ...`, followed by the counts of rivals."""

    def count(role: str) -> str:
        found = Counter(s.status for s in speeds if s.entry.role == role)
        return ", ".join([f"{found.pop('ok', 0)} timed", *(f"{n} {status}" for status, n in found.items())])

    return f"{count('ours')} (rivals: {count('rival')})"
