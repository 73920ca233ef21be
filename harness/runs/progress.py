"""Progress with the time left: a live bar on a terminal, else a plain line now and then."""

import sys
import time
from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

QUIET = 20.0  # seconds between plain lines
# From one item, which starts processes and fills caches, no time left can be told: these are the ground for an estimate.
MIN_ITEMS, MIN_SHARE = 5, 0.05  # done both, or
ENOUGH_SHARE = 0.5  # of the work, by however few items


class Progress:
    """The items of some work, what each costs in any unit, and how much of it is done.

    The time left is shown from MIN_ITEMS and MIN_SHARE on. It is counted from the call of `expect`, or from the beginning where
    the costs are known then. `now` returns the time in seconds.
    """

    def __init__(self, costs: dict[str, float], now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._done = self._known = self._spoke = 0.0
        self._count = self._measured = 0
        self.expect(costs)
        self._bar: Bar | None = None
        if sys.stdout.isatty():
            columns = (
                BarColumn(),
                TextColumn("{task.percentage:3.0f} %"),
                TimeElapsedColumn(),
                TextColumn("{task.description}"),
            )
            self._bar = Bar(*columns, console=Console())

    def __enter__(self) -> "Progress":
        if self._bar:
            self._bar.start()
            self._task = self._bar.add_task("", total=self._total)
        return self

    def expect(self, costs: dict[str, float]) -> None:
        """Take other items and costs, where they are known only after a part of the work. Time counts from here on."""
        self._costs, self._total, self._begin = costs, sum(costs.values()) or 1.0, self._now()

    def __exit__(self, *error: object) -> None:
        if self._bar:
            self._bar.stop()

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        if self._bar:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, flush=True)

    def done(self, item: str, text: str, known: bool = False) -> None:
        """Count an item as finished and show `text`. Of a resumed run, `known` items took no time: they are no measure."""
        cost = self._costs[item]
        self._done += cost
        self._count += 1
        self._known += cost * known
        self._measured += not known
        elapsed = self._now() - self._begin
        left = self._left(elapsed)
        text = f"{self._count}/{len(self._costs)} {text}" + ("" if left is None else f", about {left / 60:.1f} min left")
        if self._bar:
            self._bar.update(self._task, completed=self._done, total=self._total, description=text)
        elif elapsed - self._spoke > QUIET or self._count == len(self._costs):
            self._spoke = elapsed
            print(f"{100 * self._done / self._total:3.0f} %  {text}", flush=True)

    def _left(self, elapsed: float) -> float | None:
        """Return the seconds left after `elapsed` seconds; None where there is no ground for an estimate."""
        measured, work = self._done - self._known, self._total - self._known
        enough = self._measured >= MIN_ITEMS and measured >= MIN_SHARE * work
        if not (enough or (measured > 0 and measured >= ENOUGH_SHARE * work)):
            return None
        return elapsed * max(0.0, self._total - self._done) / measured
