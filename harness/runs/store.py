"""A run's folder: run.json says what and where, records.jsonl grows by one line a question, the report stands beside them."""

import json
import os
import shlex
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from fused.io.atomic_write import written_whole
from harness.records.record import Record
from harness.records.speed import Speed
from harness.runs.environment import ROOT

T = TypeVar("T")
RUNS = ROOT / "reports" / "runs"
ACCEPTED = ROOT / "reports" / "accepted"


class StoreError(ValueError):
    """A folder that is no run, or not one that can be continued; the message says what to do."""


class Run:
    """One folder. Records are flushed as they come, so that a killed run keeps all it had finished."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.about: dict[str, Any] = {}
        self.records: list[Record] = []
        self.speeds: list[Speed] = []

    @classmethod
    def create(cls, folder: Path | None, about: dict[str, Any]) -> "Run":
        """A new folder; by default reports/runs/TIME-KIND."""
        if folder is None:
            stem = f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{about['kind']}"
            folder = next(f for i in range(1000) if not (f := RUNS / (stem + f"-{i}" * bool(i))).exists())
        elif (folder / "run.json").exists():
            raise StoreError(f"{folder} already holds a run; continue it with --resume --out {folder}, or name another folder")
        elif folder.exists() and not folder.is_dir():
            raise StoreError(f"--out {folder} is a file; name a folder that is empty or not there yet")
        folder.mkdir(parents=True, exist_ok=True)
        run = cls(folder)
        run.about = about | {"started": _now(), "status": "running"}
        run.save()
        return run

    @classmethod
    def open(cls, folder: Path) -> "Run":
        """A folder that holds a run. A last line cut short by a kill is dropped."""
        try:
            about = json.loads((folder / "run.json").read_text())
        except (OSError, json.JSONDecodeError) as error:
            raise StoreError(f"{folder} holds no readable run ({error})") from error
        run = cls(folder)
        run.about = about
        run.records = _lines(folder / "records.jsonl", Record.parse)
        run.speeds = _lines(folder / "speeds.jsonl", Speed.parse)
        return run

    @classmethod
    def latest(cls, unfinished: bool = False, kind: str = "") -> "Run":
        """The newest run under reports/runs."""
        folders = sorted((f.parent for f in RUNS.glob("*/run.json")), reverse=True)
        for folder in folders:
            run = cls.open(folder)
            if kind in ("", run.about.get("kind")) and (not unfinished or run.about.get("status") != "finished"):
                return run
        raise StoreError(f"there is no {'unfinished ' if unfinished else ''}run under {RUNS}")

    @property
    def continued(self) -> str:
        """How this run goes on, in words."""
        command = self.about.get("command")
        resume = f"--resume --out {shlex.quote(str(self.folder))}"
        return f"continue with: {command} {resume}" if command else f"continue with the same options and {resume}"

    def add(self, record: Record) -> None:
        """Append one record."""
        self.records.append(record)
        self._append("records.jsonl", record.line())

    def add_speed(self, speed: Speed) -> None:
        """Append what one timing gave."""
        self.speeds.append(speed)
        self._append("speeds.jsonl", speed.to_line())

    def _append(self, name: str, line: str) -> None:
        with open(self.folder / name, "a") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())

    def finish(self, status: str) -> None:
        """ "finished" or "interrupted"."""
        self.about |= {"status": status, "ended": _now()}
        self.save()

    def save(self) -> None:
        """Write run.json whole or not at all."""
        with written_whole(self.folder / "run.json") as draft:
            draft.write_text(json.dumps(self.about, indent=1) + "\n")

    def counts(self, role: str = "ours") -> dict[str, int]:
        """How many records of a role passed, failed and were skipped."""
        mine = [r for r in self.records if r.role == role]
        return {
            "passed": sum(r.status == "pass" for r in mine),
            "failed": sum(r.failed for r in mine),
            "skipped": sum(r.status == "skip" for r in mine),
        }

    def last_line(self) -> str:
        """`N passed, N failed, N skipped`, rivals behind it."""
        ours, rivals = self.counts(), self.counts("rival")
        line = ", ".join(f"{ours[k]} {k}" for k in ours)
        ran = rivals["passed"] + rivals["failed"]
        return line + f" (rivals: {rivals['passed']} passed, {rivals['failed']} failed)" * bool(ran)


def resumable(run: Run, about: dict[str, Any]) -> None:
    """Raise StoreError unless the run asked the same of the same code on the same box."""
    before, now = run.about, json.loads(json.dumps(about))
    for what in ("plan", "kind"):
        if before.get(what) != now[what]:
            raise StoreError(f"{run.folder} was another run ({what} differs); {run.continued}")
    for what in ("fingerprints", "gpu", "packages"):
        if before["box"].get(what) != now["box"].get(what):
            raise StoreError(f"{run.folder}: {what} changed since; its records and new ones do not belong together")


def again(words: list[str]) -> str:
    """The command that does the same in a folder of its own."""
    kept = [w for before, w in zip(["", *words], words, strict=False) if "--out" not in (before, w.partition("=")[0])]
    return shlex.join(["python", "-m", "harness", *kept])


def _lines(path: Path, parse: Callable[[str], T]) -> list[T]:
    """One object a line; a last line cut short by a kill is dropped from the file."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    found = []
    for number, line in enumerate(lines, 1):
        try:
            found.append(parse(line))
        except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
            if number < len(lines):
                raise StoreError(f"{path}, line {number} is not a record ({error})") from error
            path.write_text("".join(lines[:-1]))
    return found


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
