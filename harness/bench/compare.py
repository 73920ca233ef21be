"""Comparison of the times of two runs, point by point."""

from dataclasses import dataclass

from harness.records import interval
from harness.records.speed import Speed
from harness.runs.store import Run, StoreError


@dataclass(frozen=True)
class Change:
    """One entry at one point, in both runs; `ratio` is new time over old."""

    base: Speed
    new: Speed
    ratio: interval.Interval
    verdict: str


def compare(base: Run, new: Run) -> tuple[list[Change], list[str]]:
    """Return the changes of entries that both runs timed, and those that cannot be compared and why.

    Raises StoreError for runs of two boxes.
    """
    boxes = [run.about["box"] for run in (base, new)]
    for field in ("gpu", "cpu"):
        if boxes[0].get(field) != boxes[1].get(field):
            raise StoreError(
                f"{field} differs: {boxes[0].get(field)} and {boxes[1].get(field)}; times of two boxes do not compare"
            )
    olds, changes, left = {s.key: s for s in base.speeds}, [], []
    for speed in new.speeds:
        old = olds.pop(speed.key, None)
        name = " ".join(speed.key)
        if old is None:
            left.append(f"{name}: only in {new.folder}")
        elif "gated" in (old.status, speed.status):
            left.append(f"{name}: gated, it has no speed")
        elif not (old.seconds and speed.seconds):
            left.append(f"{name}: {old.status}, then {speed.status}")
        else:
            change = interval.ratio(old.seconds, speed.seconds)
            changes.append(Change(old, speed, change, interval.verdict(change)))
    return changes, left + [f"{' '.join(key)}: only in {base.folder}" for key in olds]
