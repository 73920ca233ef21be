"""Timing of entries in rounds: a drift of the clock or of the room's temperature then affects all of them alike."""

import statistics
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from harness.bench.worker import Batch, EntryFailed, Worker
from harness.records import interval
from harness.records.speed import Point, Speed

GOAL = 0.01  # half the interval's width, relative to the median, at which more samples are no use
FEWEST, MOST, ROUNDS = 7, 400, 8
TIMEOUT = 300.0  # seconds for one answer of a worker
MIN_SECONDS_FOR_ENERGY = 0.4  # of samples: the counter of energy is renewed some ten times a second


@dataclass(eq=False)
class TimedEntry:
    """A worker at a point, and its measurements so far."""

    worker: Worker
    point: Point
    loaded: dict[str, Any] = field(default_factory=dict)
    batches: list[Batch] = field(default_factory=list)
    alone: bool = False
    failure: EntryFailed | None = None
    fewest: int = 3  # samples below which a spent budget is no reason to stop

    @property
    def samples(self) -> list[float]:
        """Return the seconds of all samples."""
        return [second for batch in self.batches for second in batch.seconds]

    @property
    def settled(self) -> bool:
        """Return whether its interval is narrow enough."""
        return len(self.samples) >= max(FEWEST, self.fewest) and interval.median(self.samples).spread <= GOAL

    def speed(self) -> Speed:
        """Return its record."""
        entry, point = self.worker.entry, self.point
        if self.failure:
            return Speed(entry, point, self.failure.status, alone=self.alone, reason=self.failure.reason)
        return Speed(
            entry, point, "ok", tuple(self.samples), tuple(self.loaded["warm"]), "interval" if self.settled else "budget",
            self.alone, self.loaded["allocated"], self.loaded["reserved"], self._joules(),
            statistics.median(clocks) if (clocks := [b.clock for b in self.batches if b.clock is not None]) else None,
            host=tuple(map(statistics.median, zip(*(host for b in self.batches for host in b.hosts), strict=True))),
        )  # fmt: skip

    def _joules(self) -> float | None:
        spent = [batch.joules for batch in self.batches]
        if sum(batch.spent for batch in self.batches) < MIN_SECONDS_FOR_ENERGY:
            return None
        calls = sum(len(batch.seconds) * batch.calls for batch in self.batches)
        return None if None in spent else sum(j for j in spent if j is not None) / calls


def interleave(
    workers: list[Worker], point: Point, budget: float, together: bool = True, fewest: int = 3
) -> Iterator[Speed]:
    """Time all workers at a point for `budget` seconds each, and yield their speeds.

    Those that fit into the memory at the same time are interleaved. One that does not fit with the others is timed alone:
    an out-of-memory error then is its own. If all fit (`together`), all load at once, which takes as long as
    the slowest. Where calls are slow, `fewest` samples are taken whatever the budget.
    """
    entries = [TimedEntry(worker, point, fewest=fewest) for worker in workers]
    for worker in workers:
        worker.start()
    if together:
        with ThreadPoolExecutor() as threads:
            list(threads.map(_load, entries))
    else:
        for entry in entries:
            _load(entry)
    crowded = [e for e in entries if e.failure and e.failure.status == "oom" and len(entries) > 1]
    _sample([e for e in entries if e not in crowded], budget)
    for entry in entries:
        _drop(entry)
    for entry in crowded:
        entry.failure, entry.alone = None, True
        _load(entry)
        _sample([entry], budget)
        _drop(entry)
    yield from (entry.speed() for entry in entries)


def _sample(entries: list[TimedEntry], budget: float) -> None:
    """Take rounds of one batch of samples each, an eighth of the budget or less, until all are settled or have spent theirs."""
    spent = {id(entry): 0.0 for entry in entries}

    def done(entry: TimedEntry) -> bool:
        if entry.failure or entry.settled or len(entry.samples) >= MOST:
            return True
        return spent[id(entry)] >= budget and len(entry.samples) >= entry.fewest

    while remaining := [entry for entry in entries if not done(entry)]:
        for entry in remaining:
            try:
                most = max(1, MOST // (2 * ROUNDS))
                batch = entry.worker.ask("time", budget / ROUNDS, most, timeout=TIMEOUT)
            except EntryFailed as failure:
                entry.failure = failure
                continue
            entry.batches.append(batch)
            spent[id(entry)] += batch.spent


def _load(entry: TimedEntry) -> None:
    if entry.failure:
        return
    try:
        entry.loaded = entry.worker.ask("load", entry.point, timeout=TIMEOUT)
    except EntryFailed as failure:
        entry.failure = failure


def _drop(entry: TimedEntry) -> None:
    if entry.loaded and not entry.failure:
        try:
            entry.worker.ask("drop", timeout=TIMEOUT)
        except EntryFailed as failure:
            entry.failure = failure
