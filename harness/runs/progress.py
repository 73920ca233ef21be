"""Progress with the time left: a live bar on a terminal, else a plain line now and then."""

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

QUIET = 20.0  # seconds between plain lines


class Progress:
    """The items of some work, what each costs in any unit, and how much of it is done."""

    def __init__(self, costs: dict[str, float]) -> None:
        self._done = 0.0
        self.expect(costs)
        self._count, self._begin, self._spoke = 0, time.monotonic(), 0.0
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
        """Take other items and costs, where they are known only after a part of the work."""
        self._costs, self._total = costs, sum(costs.values()) or 1.0

    def __exit__(self, *error: object) -> None:
        if self._bar:
            self._bar.stop()

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        if self._bar:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, flush=True)

    def done(self, item: str, text: str) -> None:
        """Count an item as finished and show `text`; finished ones of a resumed run count too."""
        self._done += self._costs[item]
        self._count += 1
        elapsed = time.monotonic() - self._begin
        left = elapsed * max(0.0, self._total - self._done) / max(self._done, 1e-9)
        text = f"{self._count}/{len(self._costs)} {text}, about {left / 60:.1f} min left"
        if self._bar:
            self._bar.update(self._task, completed=self._done, total=self._total, description=text)
        elif elapsed - self._spoke > QUIET or self._count == len(self._costs):
            self._spoke = elapsed
            print(f"{100 * self._done / self._total:3.0f} %  {text}", flush=True)
