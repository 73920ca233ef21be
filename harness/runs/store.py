"""A run's folder: run.json describes it, records.jsonl grows by one line a question, the report is in the same folder."""

import contextlib
import json
import os
import shlex
import tempfile
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from fused.io.atomic_write import atomic_write
from harness.records.record import Record
from harness.records.speed import Speed
from harness.runs import sessions
from harness.runs.environment import ROOT

T = TypeVar("T")
RUNS = ROOT / "reports" / "runs"


class StoreError(ValueError):
    """A folder that is no run, or not one that can be continued; the message says what to do."""


class Run:
    """One folder. `about` is its run.json. Records are flushed as they come, so that a killed run keeps all it had finished."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.about: dict[str, Any] = {}
        self.records: list[Record] = []
        self.speeds: list[Speed] = []
        self._kept: dict[str, int] = {}  # bytes of complete lines in the files that were read

    @classmethod
    def create(cls, folder: Path | None, about: dict[str, Any]) -> "Run":
        """Make a new folder, by default reports/runs/TIME-KIND. Raises StoreError if it holds a run or cannot be written."""
        if folder is None:
            stem = f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{about['kind']}"
            folder = next(f for i in range(1000) if not (f := RUNS / (stem + f"-{i}" * bool(i))).exists())
        elif (folder / "run.json").exists():
            raise StoreError(f"{folder} already holds a run; continue it with --resume --out {folder}, or name another folder")
        require_writable(folder)
        folder.mkdir(parents=True, exist_ok=True)
        run = cls(folder)
        run.about = about | {"started": sessions.now(), "status": "running", "sessions": [sessions.begun(about)]}
        run.save()
        return run

    @classmethod
    def open(cls, folder: Path) -> "Run":
        """Read a folder that holds a run. A last line cut short by a kill is left out. Raises StoreError if there is no run."""
        if not (folder / "run.json").exists():
            raise StoreError(f"{folder} holds no run: {'it has no run.json' if folder.is_dir() else 'there is no such folder'}")
        try:
            about = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:  # ValueError: no JSON, or no UTF-8; else nested too deeply
            raise StoreError(f"{folder} holds no readable run ({error})") from error
        if not isinstance(about, dict):
            raise StoreError(f"{folder} holds no readable run (run.json holds a {type(about).__name__})")
        run = cls(folder)
        run.about = about
        run.records = run._read("records.jsonl", Record.parse)
        run.speeds = run._read("speeds.jsonl", Speed.parse)
        return run

    @classmethod
    def latest(cls, unfinished: bool = False, kind: str = "") -> "Run":
        """Open the newest run under reports/runs. Raises StoreError if there is none."""
        folders = sorted((f.parent for f in RUNS.glob("*/run.json")), reverse=True)
        for folder in folders:
            run = cls.open(folder)
            if kind in ("", run.about.get("kind")) and (not unfinished or run.about.get("status") != "finished"):
                return run
        raise StoreError(f"there is no {'unfinished ' if unfinished else ''}run under {RUNS}")

    def resume(self, about: dict[str, Any]) -> None:
        """Begin another session. Raises StoreError unless `about` asks the same of the same code on the same box."""
        given = json.loads(json.dumps(about))
        for key in ("plan", "kind"):
            if self.about.get(key) != given[key]:
                raise StoreError(f"{self.folder} was another run ({key} differs); {self.how_to_continue}")
        if found := sessions.differences(self.about["box"], given["box"]):
            raise StoreError(
                f"{self.folder} cannot be continued, its records and new ones do not belong together: {'; '.join(found)}; "
                "go back to that code and box, or start a new run without --resume"
            )
        before = sessions.of(self.about)
        if before[-1].get("status") == "running":  # nothing was left to say how it ended
            before[-1]["status"] = "killed"
        self.about |= {"status": "running", "sessions": [*before, sessions.begun(given)]}
        self.save()

    @property
    def how_to_continue(self) -> str:
        """Return the command that continues this run, in words."""
        command = self.about.get("command")
        resume = f"--resume --out {shlex.quote(str(self.folder))}"
        return f"continue with: {command} {resume}" if command else f"continue with the same options and {resume}"

    def add(self, record: Record) -> None:
        """Append one record."""
        self.records.append(record)
        self._append("records.jsonl", record.line())

    def add_speed(self, speed: Speed) -> None:
        """Append the result of one timing."""
        self.speeds.append(speed)
        self._append("speeds.jsonl", speed.to_line())

    def finish(self, status: str, changed: Sequence[str] = ()) -> None:
        """Write how the session, and so far the run, ended: "finished" or "interrupted".

        `changed` are phrases on sources that are others by now than those that run.json recorded at the start.
        """
        end = {"status": status, "ended": sessions.now()}
        self.about |= end
        if "sessions" in self.about:
            self.about["sessions"][-1] |= end | ({"changed": list(changed)} if changed else {})
        self.save()

    def save(self) -> None:
        """Write run.json atomically."""
        with atomic_write(self.folder / "run.json") as draft:
            draft.write_text(json.dumps(self.about, indent=1) + "\n")

    def counts(self, role: str = "ours") -> dict[str, int]:
        """Return how many records of a role passed, failed and were skipped."""
        mine = [r for r in self.records if r.role == role]
        return {
            "passed": sum(r.status == "pass" for r in mine),
            "failed": sum(r.failed for r in mine),
            "skipped": sum(r.status == "skip" for r in mine),
        }

    def last_line(self) -> str:
        """Return `N passed, N failed, N skipped`, followed by the counts of rivals."""
        ours, rivals = self.counts(), self.counts("rival")
        line = ", ".join(f"{ours[k]} {k}" for k in ours)
        ran = rivals["passed"] + rivals["failed"]
        return line + f" (rivals: {rivals['passed']} passed, {rivals['failed']} failed)" * bool(ran)

    def _read(self, name: str, parse: Callable[[str], T]) -> list[T]:
        """Return one object a line. Only the last line may be cut short; the first `_append` removes it from the file."""
        path = self.folder / name
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        found = []
        for number, line in enumerate(lines, 1):
            try:
                found.append(parse(line.decode()))
            except (KeyError, TypeError, ValueError, RecursionError) as error:
                if number < len(lines):
                    raise StoreError(f"{path}, line {number} is not a record ({error})") from error
        self._kept[name] = sum(map(len, lines[: len(found)]))
        return found

    def _append(self, name: str, line: str) -> None:
        """Append a line and flush it to the disk."""
        with open(self.folder / name, "a+b") as file:
            if name in self._kept:
                file.truncate(kept := self._kept.pop(name))
                file.seek(max(0, kept - 1))
                if kept and file.read(1) != b"\n":
                    file.write(b"\n")
            file.write(f"{line}\n".encode())
            file.flush()
            os.fsync(file.fileno())


def require_writable(folder: Path | None) -> None:
    """Raise StoreError unless a run can be written to the folder, by default one under reports/runs. Nothing is left behind."""
    given, folder = folder, folder or RUNS
    added: list[Path] = []
    try:
        added = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        if folder.is_file():
            raise StoreError(f"--out {folder} is a file; name a folder that is empty or not there yet") from error
        what = f"--out {folder}" if given else f"{folder}, where runs are kept without --out,"
        raise StoreError(f"{what} cannot be written ({error.strerror or error}); name another folder with --out") from error
    finally:
        for path in added:
            with contextlib.suppress(OSError):
                path.rmdir()


def begin(about: dict[str, Any], words: list[str], folder: Path | None, earlier: Run | None = None) -> Run:
    """Return a new run in `folder`, or `earlier` with another session. `words` are the command line's."""
    about = about | {"command": command(words)}
    if earlier is None:
        return Run.create(folder, about)
    earlier.resume(about)
    return earlier


def unfinished(folder: Path | None, kind: str) -> Run:
    """Return the run that `--resume` means: the one in `folder`, by default the newest unfinished one of its kind."""
    return Run.open(folder) if folder else Run.latest(unfinished=True, kind=kind)


def command(words: list[str]) -> str:
    """Return the command that does the same in a folder of its own: `python -m harness WORDS` without --out."""
    kept = [w for before, w in zip(["", *words], words, strict=False) if "--out" not in (before, w.partition("=")[0])]
    return shlex.join(["python", "-m", "harness", *kept])
