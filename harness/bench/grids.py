"""The races and their points, as the subjects carry them, and the entries that are timed there."""

from collections.abc import Iterable

from harness.bench import roofline
from harness.judge.implementation import Implementation
from harness.judge.protocols import HasRaces, SelectsContenders
from harness.judge.race import KINDS, Race
from harness.judge.race import NATIVE_KEPT as NATIVE_KEPT
from harness.judge.registry import subjects
from harness.records.speed import Entry, Point

GRIDS = ("cpu", "full", "long")


def races(kind: str = "") -> dict[str, Race]:
    """Return the races of all subjects by name, or those of one kind, in the order of `KINDS`."""
    found = [race for subject in subjects().values() if isinstance(subject, HasRaces) for race in subject.races()]
    found.sort(key=lambda race: (KINDS.index(race.kind), race.order))
    return {race.name: race for race in found if kind in ("", race.kind)}


def chosen_races(names: Iterable[str]) -> list[str]:
    """Return the names of races that are to be timed: these, or without any those that are timed by default."""
    return list(names) or [name for name, race in races().items() if race.by_default]


def race_of(point: Point) -> Race:
    """Return the race of a point; one that no subject carries has the defaults."""
    return races().get(point.race) or Race(point.race, title=point.race, words=lambda sizes: point.name)


def points(grid: str) -> list[Point]:
    """Return all points of a grid, race by race, short ones first."""
    return [point for race in races().values() for point in race.points(grid)]


def entries(race: str, device: str, fastest: str, names: tuple[str, ...] = ()) -> list[Entry]:
    """Return the entries that can run a race here.

    They are every implementation of ours and its rivals, but not the reference, whose loop no one would use; and the ViT with
    naive attention and with the `fastest` of this box. `names` keeps some of them.

    Raises NoBound for a subject without a bound or licence.
    """
    found, chosen = [], races()[race]
    for subject, variant in chosen.contenders:
        roofline.timed(subject)
        for i in contenders(subject, fastest):
            able = i.abilities
            if i.absent(device) is None and all(able and getattr(able, ability) for ability in chosen.needs):
                found.append(Entry(subject, i.name, i.role, chosen.maker, variant))
    return [e for e in found if not names or e.implementation in names]


def contenders(subject: str, kernel: str | None) -> list[Implementation]:
    """Return the timed implementations of a subject: all but the reference, unless it selects them by the fastest `kernel`."""
    module = subjects()[subject]
    if isinstance(module, SelectsContenders):
        return module.contenders(kernel)
    return [i for i in module.implementations() if i.name != "reference"]


def runs(entry: Entry, point: Point, grid: str) -> bool:
    """Return whether an entry is timed at a point of its race."""
    return race_of(point).runs(entry, point, grid)


def absent(names: Iterable[str], device: str) -> list[dict[str, str]]:
    """Return the contenders of these races that cannot run here, with the reasons."""
    every = races()
    raced = dict.fromkeys(subject for name in names for subject, _ in every[name].contenders)
    return [
        {"subject": subject, "implementation": i.name, "role": i.role, "reason": reason}
        for subject in raced
        for i in contenders(subject, None)
        if (reason := i.absent(device))
    ]
