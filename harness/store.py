"""A run's folder: run.json says what and where, records.jsonl grows by one line a question, the report stands beside them."""

import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from harness.environment import ROOT
from harness.record import Record

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

    @classmethod
    def create(cls, folder: Path | None, about: dict[str, Any]) -> "Run":
        """A new folder; by default reports/runs/TIME-KIND."""
        if folder is None:
            stem = f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{about['kind']}"
            folder = next(f for i in range(1000) if not (f := RUNS / (stem + f"-{i}" * bool(i))).exists())
        elif (folder / "run.json").exists():
            raise StoreError(f"{folder} already holds a run; continue it with --resume --out {folder}, or name another folder")
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
        path = folder / "records.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        for number, line in enumerate(lines, 1):
            try:
                run.records.append(Record.parse(line))
            except (json.JSONDecodeError, KeyError, ValueError) as error:
                if number < len(lines):
                    raise StoreError(f"{path}, line {number} is not a record ({error})") from error
                path.write_text("".join(lines[:-1]))
        return run

    @classmethod
    def latest(cls, unfinished: bool = False) -> "Run":
        """The newest run under reports/runs."""
        folders = sorted((f.parent for f in RUNS.glob("*/run.json")), reverse=True)
        for folder in folders:
            run = cls.open(folder)
            if not unfinished or run.about.get("status") != "finished":
                return run
        raise StoreError(f"there is no {'unfinished ' if unfinished else ''}run under {RUNS}")

    def add(self, record: Record) -> None:
        """Append one record."""
        self.records.append(record)
        with open(self.folder / "records.jsonl", "a") as file:
            file.write(record.line() + "\n")
            file.flush()
            os.fsync(file.fileno())

    def finish(self, status: str) -> None:
        """ "finished" or "interrupted"."""
        self.about |= {"status": status, "ended": _now()}
        self.save()

    def save(self) -> None:
        """Write run.json whole or not at all."""
        draft = self.folder / "run.json.part"
        draft.write_text(json.dumps(self.about, indent=1) + "\n")
        draft.replace(self.folder / "run.json")

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


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
