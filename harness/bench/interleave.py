"""Rivals take turns: a drift of the clock or of the room's temperature then meets all of them alike."""

import statistics
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from harness.bench.worker import Gone, Turn, Worker
from harness.records import interval
from harness.records.speed import Point, Speed

GOAL = 0.01  # half the interval's width, relative to the median, at which more samples are no use
FEWEST, MOST, ROUNDS = 7, 400, 8
LIMIT = 300.0  # seconds for one answer of a worker
COUNTED = 0.4  # seconds of samples below which a counter of energy, renewed some ten times a second, says nothing


@dataclass(eq=False)
class Seat:
    """A worker at a point: what it has measured so far."""

    worker: Worker
    point: Point
    loaded: dict[str, Any] = field(default_factory=dict)
    turns: list[Turn] = field(default_factory=list)
    alone: bool = False
    gone: Gone | None = None

    @property
    def samples(self) -> list[float]:
        """Seconds of all turns."""
        return [second for turn in self.turns for second in turn.seconds]

    @property
    def settled(self) -> bool:
        """Whether its interval is narrow enough."""
        return len(self.samples) >= max(FEWEST, self.point.fewest) and interval.median(self.samples).spread <= GOAL

    def speed(self) -> Speed:
        """Its record."""
        entry, point = self.worker.entry, self.point
        if self.gone:
            return Speed(entry, point, self.gone.status, alone=self.alone, reason=self.gone.reason)
        return Speed(
            entry, point, "ok", tuple(self.samples), tuple(self.loaded["warm"]), "interval" if self.settled else "budget",
            self.alone, self.loaded["allocated"], self.loaded["reserved"], self._joules(),
            statistics.median(clocks) if (clocks := [t.clock for t in self.turns if t.clock is not None]) else None,
        )  # fmt: skip

    def _joules(self) -> float | None:
        spent = [turn.joules for turn in self.turns]
        if sum(self.samples) < COUNTED:
            return None
        return None if None in spent else sum(j for j in spent if j is not None) / len(self.samples)


def race(workers: list[Worker], point: Point, budget: float, roomy: bool = True) -> Iterator[Speed]:
    """Time all workers at a point for `budget` seconds each. Those that fit into the memory together take turns. One that
    does not fit beside the others has the device to itself: running out of memory is then its own doing. Where there is room
    for all, all load at once, which takes as long as the slowest."""
    seats = [Seat(worker, point) for worker in workers]
    for worker in workers:
        worker.start()
    if roomy:
        with ThreadPoolExecutor() as threads:
            list(threads.map(_load, seats))
    else:
        for seat in seats:
            _load(seat)
    crowded = [s for s in seats if s.gone and s.gone.status == "oom" and len(seats) > 1]
    _take_turns([s for s in seats if s not in crowded], budget)
    for seat in seats:
        _drop(seat)
    for seat in crowded:
        seat.gone, seat.alone = None, True
        _load(seat)
        _take_turns([seat], budget)
        _drop(seat)
    yield from (seat.speed() for seat in seats)


def _take_turns(seats: list[Seat], budget: float) -> None:
    """Rounds of one turn each, a turn an eighth of the budget or less, until all are settled or have spent theirs."""
    spent = {id(seat): 0.0 for seat in seats}

    def done(seat: Seat) -> bool:
        if seat.gone or seat.settled or len(seat.samples) >= MOST:
            return True
        return spent[id(seat)] >= budget and len(seat.samples) >= seat.point.fewest

    while waiting := [seat for seat in seats if not done(seat)]:
        for seat in waiting:
            try:
                most = max(1, MOST // (2 * ROUNDS))
                taken = seat.worker.ask("time", budget / ROUNDS, most, limit=LIMIT)
            except Gone as gone:
                seat.gone = gone
                continue
            seat.turns.append(taken)
            spent[id(seat)] += sum(taken.seconds)


def _load(seat: Seat) -> None:
    if seat.gone:
        return
    try:
        seat.loaded = seat.worker.ask("load", seat.point, limit=LIMIT)
    except Gone as gone:
        seat.gone = gone


def _drop(seat: Seat) -> None:
    if seat.loaded and not seat.gone:
        try:
            seat.worker.ask("drop", limit=LIMIT)
        except Gone as gone:
            seat.gone = gone
