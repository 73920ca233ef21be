"""The runs that stand as evidence together: which they are, and which of them are there already."""

import contextlib
import re
import shlex
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from harness.runs import acceptance, freshness, sessions, store
from harness.runs.store import Run, StoreError

LIST = Path(__file__).resolve().parents[1] / "evidence.toml"
NAME = re.compile(r"[\w-]+")
LEAST = 1.0  # minutes that a run needs at least, and the rest of one that was cut
ACCEPTED, FINISHED, FAILED, CUT, MISSING = "accepted", "finished", "failed", "cut", "missing"


@dataclass(frozen=True)
class Entry:
    """A run of the list: its command, the minutes that it takes, the GPUs that it needs, and what it stands for.

    `measured` names the accepted run that took these minutes; empty where they are an estimate.
    """

    name: str
    command: str
    minutes: float
    gpus: int
    claim: str
    measured: str = ""


class State(NamedTuple):
    """Whether the run of an entry is there, with a reason where it is not to be had. `run` is None of a missing one."""

    status: str
    run: Run | None = None
    reason: str = ""

    @property
    def there(self) -> bool:
        """Return whether it is accepted or can be."""
        return self.status in (ACCEPTED, FINISHED)


def read(path: Path = LIST) -> list[Entry]:
    """Return the entries of a list, in its order. Raises ValueError that names the file, the entry and what is wrong."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no readable list of runs: {error}") from error
    return [_entry(path, name, raw) for name, raw in table.items()]


def _entry(path: Path, name: str, raw: Any) -> Entry:
    """Return one entry of a list."""
    wanted = dict.fromkeys(f.name for f in fields(Entry) if f.name != "name")
    if not NAME.fullmatch(name):
        raise ValueError(f"{path}: the name {name!r} is not made of letters, digits, - and _: it becomes that of a folder")
    if not isinstance(raw, dict):
        raise ValueError(f"{path}: {name} is a {type(raw).__name__}, not a table of {', '.join(wanted)}")
    if unknown := raw.keys() - wanted.keys():
        raise ValueError(f"{path}: {name} has an unknown key {min(unknown)!r}; allowed are {', '.join(wanted)}")
    if missing := wanted.keys() - raw.keys() - {"measured"}:
        raise ValueError(f"{path}: {name} lacks {', '.join(sorted(missing))}")
    for key, value in raw.items():
        kinds = {"minutes": (int, float), "gpus": (int,)}.get(key, (str,))
        if type(value) not in kinds or (kinds != (str,) and value < 0):
            allowed = "a text" if kinds == (str,) else "a number, 0 or more"
            raise ValueError(f"{path}: {key} of {name} is {value!r}; it must be {allowed}")
    if not shlex.split(raw["command"]):
        raise ValueError(f"{path}: command of {name} is empty")
    return Entry(name, **raw)


def runs_in(folders: Iterable[Path]) -> list[Run]:
    """Return the runs in those of the folders that hold a readable one, the newest first."""
    found = []
    for folder in folders:
        with contextlib.suppress(StoreError):
            found.append(Run.open(folder))
    return sorted(found, key=lambda run: str(run.about.get("started")), reverse=True)


def state_of(entry: Entry, box: dict[str, Any], runs: Sequence[Run], accepted: Sequence[Run]) -> State:
    """Return the state of an entry's run among those under reports/runs and the accepted ones, each the newest first.

    An accepted run counts if it is of this code. Another one counts if it is of this box and, byte for byte, of this code.
    """
    for run in accepted:
        if _has_command(run, entry) and freshness.changed_since(run) == ():
            return State(ACCEPTED, run)
    mine = [r for r in runs if _has_command(r, entry) and _is_of(r, box)]
    for run in sorted(mine, key=lambda run: run.about.get("status") != "finished"):
        if run.about.get("status") != "finished":
            return State(CUT, run)
        try:
            acceptance.require_evidence(run)
        except StoreError as error:
            return State(FAILED, run, str(error))
        return State(FINISHED, run)
    return State(MISSING)


def _has_command(run: Run, entry: Entry) -> bool:
    """Return whether a run, or a part of a joined one, was made by an entry's command."""
    return shlex.join(shlex.split(entry.command)) in str(run.about.get("command")).splitlines()


def _is_of(run: Run, box: dict[str, Any]) -> bool:
    """Return whether a run is of this box and this code, which was a commit's and did not change during the run."""
    dirty = any(session["box"].get("git", {}).get("dirty") for session in sessions.of(run.about))
    return not (dirty or sessions.changed_sources(run.about) or sessions.differences(run.about.get("box", {}), box))


def minutes_left(entry: Entry, state: State) -> float:
    """Return the minutes that an entry's run needs yet: all, or what the sessions of a cut one have not used."""
    used = 0.0
    for session in sessions.of(state.run.about) if state.run else ():
        if session.get("started") and session.get("ended"):
            begun, ended = (datetime.fromisoformat(session[key]) for key in ("started", "ended"))
            used += max(0.0, (ended - begun).total_seconds() / 60)  # a clock may be set back
    return max(LEAST, entry.minutes - used)


def new_folder(entry: Entry) -> Path:
    """Return a folder under reports/runs that is not there yet: the day and the entry's name."""
    stem = f"{datetime.now(UTC):%Y%m%d}-{entry.name}"
    return next(f for i in range(1000) if not (f := store.RUNS / (stem + f"-{i}" * bool(i))).exists())
