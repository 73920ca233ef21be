"""Several runs of one kind as one: what several calls asked of the same code on the same box."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness.runs import sessions
from harness.runs.store import Run, StoreError

MAY_DIFFER = ("budget", "threads", "jobs")  # options of a plan that leave every question as it is


def join(runs: Sequence[Run], folder: Path) -> Run:
    """Write a run with the sessions and results of all runs into a folder, and return it.

    Of a question or a point that several runs have, the newest result counts. The runs may differ in one option that narrows,
    such as their races or subjects, whose values the whole has together: with two, it would claim questions that no run asked.
    Raises StoreError for runs of several kinds, codes, boxes or grids, with what differs.
    """
    runs = sorted(runs, key=lambda run: str(run.about["started"]))
    first = runs[0]
    for run in runs[1:]:
        if run.about["kind"] != first.about["kind"]:
            raise StoreError(f"{run.folder} is a run of {run.about['kind']}, {first.folder} of {first.about['kind']}")
        found = sessions.differences(first.about["box"], run.about["box"])
        if found:
            both = f"{first.folder} and {run.folder}"
            raise StoreError(f"{both} are no parts of one run, they differ in {'; '.join(found)}; accept each by itself")
    about = first.about | {
        "plan": _plan(runs),
        "sessions": [session for run in runs for session in sessions.of(run.about)],
        "command": "\n".join(dict.fromkeys(str(run.about.get("command")) for run in runs)),
        "ended": runs[-1].about.get("ended"),
    }
    if any("filtered" in run.about for run in runs):
        about["filtered"] = any(about["plan"].get(key) for key in ("subjects", "checks", "names", "dtypes", "cases"))
    joined = Run(folder)
    joined.about = about
    joined.records = list({record.key: record for run in runs for record in run.records}.values())
    joined.speeds = list({speed.key: speed for run in runs for speed in run.speeds}.values())
    folder.mkdir(parents=True, exist_ok=True)
    for name, lines in (
        ("records.jsonl", [record.line() for record in joined.records]),
        ("speeds.jsonl", [speed.to_line() for speed in joined.speeds]),
    ):
        if lines:
            (folder / name).write_text("".join(f"{line}\n" for line in lines))
    joined.save()
    return joined


def _plan(runs: Sequence[Run]) -> dict[str, Any]:
    """Return the plan of the whole: of the option in which the runs differ what any of them had, nothing where one had all.

    Raises StoreError for runs that differ in more options, or in one that is no list.
    """
    plans = [run.about["plan"] for run in runs]
    keys = dict.fromkeys(key for plan in plans for key in plan)
    differing = [k for k in keys if k not in MAY_DIFFER and any((p.get(k) or None) != (plans[0].get(k) or None) for p in plans)]
    lists = [k for k in differing if all(isinstance(p.get(k) or [], list | tuple) for p in plans)]
    if len(differing) > 1 or differing != lists:
        said = "; ".join(f"{k} {', '.join(str(p.get(k) or 'all') for p in plans)}" for k in differing)
        raise StoreError(f"the runs differ in {said}; allowed: one option that narrows. Accept each by itself")
    whole = dict(plans[0])
    for key in differing:
        values = [plan.get(key) or [] for plan in plans]
        whole[key] = list(dict.fromkeys(item for value in values for item in value)) if all(values) else []
    return whole
