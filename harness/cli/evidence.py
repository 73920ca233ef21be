"""`python -m harness evidence`."""

import contextlib
import ctypes
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from harness.judge.request import UsageError
from harness.runs import acceptance, environment, evidence, freshness, store, workers
from harness.runs.conclude import FAILED, INTERRUPTED, NOTHING, PASSED, SIGNALS
from harness.runs.evidence import Entry, State

RESERVE = 0.5  # minutes before the end at which a run is told to stop, for its report
PATIENCE = 25.0  # seconds that it has to end then
PR_SET_PDEATHSIG = 1  # of Linux's prctl


def make(
    only: Annotated[list[str] | None, typer.Option(help="run of the list (--dry-run shows them); all by default")] = None,
    minutes: Annotated[float, typer.Option(min=0.0, help="time for all; what is under way then is cut")] = 25.0,
    entries: Annotated[Path, typer.Option("--list", help="the runs, as TOML")] = evidence.LIST,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="show what is there and what is missing")] = False,
) -> None:
    """Make the runs that stand as evidence and are missing for this code, the most important first, in so many minutes.

    Goes on with runs that were cut, keeps those that are finished, and begins the first that fits into the time left, or the
    first where none fits. A failed run is not made again while its folder is there. Exits 0 if all runs are finished or
    accepted, 1 if one failed, 130 if some are left for another call, 3 if none is there.
    """
    try:
        every = evidence.read(entries)
    except ValueError as error:
        raise UsageError(str(error)) from error
    for name in only or ():
        if name not in (names := [entry.name for entry in every]):
            raise UsageError(f"--only {name!r} is unknown; allowed are {', '.join(names)}")
    chosen = [entry for entry in every if not only or entry.name in only]
    gpus = torch.cuda.device_count()
    box, accepted = describe(gpus), evidence.runs_in(acceptance.ACCEPTED.glob("*/*"))
    runs = evidence.runs_in(store.RUNS.glob("*"))
    states = {entry.name: evidence.state_of(entry, box, runs, accepted) for entry in chosen}
    if dry_run:
        print(*plan(chosen, states), sep="\n")
        for run in accepted:
            print(f"accepted run {run.folder.name}: {freshness.in_words(freshness.changed_since(run))}")
        return
    store.require_writable(None)
    if environment.git()["dirty"]:
        raise UsageError("reference, fused or harness differ from their commit: commit first, else no run can be accepted")
    done = work([e for e in chosen if e.gpus <= gpus], states, box, time.monotonic() + 60 * minutes)
    print(*table(chosen, states, gpus), sep="\n")
    raise typer.Exit(exit_code([states[e.name] for e in chosen]) if done else INTERRUPTED)


def describe(gpus: int) -> dict[str, Any]:
    """Return the description of this box; of one with GPUs by another process, so that this one holds no memory of theirs."""
    if not gpus:
        return environment.describe("cpu")
    with workers.pool(1) as pool:
        return pool.submit(environment.describe, "cuda").result()


def work(entries: Sequence[Entry], states: dict[str, State], box: dict[str, Any], end: float) -> bool:
    """Make the runs of entries until the time `end` and renew their states; return False after Ctrl-C or SIGTERM."""
    left = [entry for entry in entries if states[entry.name].status in (evidence.CUT, evidence.MISSING)]
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        while left and (room := (end - time.monotonic()) / 60 - RESERVE) >= evidence.LEAST:
            fits = (entry for entry in left if evidence.minutes_left(entry, states[entry.name]) <= room)
            left.remove(entry := next(fits, left[0]))
            needs, run = evidence.minutes_left(entry, states[entry.name]), states[entry.name].run
            resume = ["--resume"] * bool(run)
            print(f"{entry.name}, about {needs:.0f} of {room:.0f} minutes:", entry.command, *resume, flush=True)
            folder = run.folder if run else evidence.new_folder(entry)
            code = INTERRUPTED
            try:
                code = run_until([*shlex.split(entry.command), *resume, "--out", str(folder)], end - 60 * RESERVE)
            finally:
                state = evidence.state_of(entry, box, evidence.runs_in([folder]), ())
                if code != INTERRUPTED and state.status in (evidence.CUT, evidence.MISSING):
                    reason = f"its command ended with exit code {code} and without a finished run"
                    state = State(evidence.FAILED, state.run, reason)
                states[entry.name] = state
    except KeyboardInterrupt:
        return False
    finally:
        signal.signal(signal.SIGTERM, before)
    return True


def run_until(words: Sequence[str], end: float) -> int:
    """Return the exit code of a command; INTERRUPTED if it was told to stop at the time `end`.

    It is told so too where this process is interrupted, and where it ends by itself.
    """
    program = sys.executable if words[0] == "python" else words[0]
    child = subprocess.Popen([program, *words[1:]], cwd=environment.ROOT, preexec_fn=_end_with_parent)
    try:
        return child.wait(max(0.0, end - time.monotonic()))
    except subprocess.TimeoutExpired:
        _stop(child)
        return INTERRUPTED
    except KeyboardInterrupt:
        _stop(child)
        raise


def _end_with_parent() -> None:
    """Ask Linux for a SIGTERM to this process when its parent ends, even by kill -9."""
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _stop(child: "subprocess.Popen[bytes]") -> None:
    """End a command, which keeps what it has. A second Ctrl-C does not keep it from its report."""
    before = {s: signal.signal(s, signal.SIG_IGN) for s in SIGNALS}
    try:
        child.terminate()
        child.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


def plan(entries: Sequence[Entry], states: Mapping[str, State]) -> list[str]:
    """Return two lines for each entry: its state, claim, time and GPUs, and its command."""
    lines, left = [], []
    for entry in entries:
        status = states[entry.name].status
        source = f"as {entry.measured} took" if entry.measured else "an estimate"
        gpus = f"{entry.gpus} GPU" + "s" * (entry.gpus != 1)
        lines.append(f"{status:8}  {entry.name:14}  {entry.claim}; {entry.minutes:g} min, {source}, {gpus}")
        lines.append(f"{'':26}{entry.command}")
        left += [evidence.minutes_left(entry, states[entry.name])] * (status in (evidence.CUT, evidence.MISSING))
    return [*lines, f"{len(left)} of {len(entries)} runs are to be made, about {sum(left):.0f} minutes"]


def table(entries: Sequence[Entry], states: Mapping[str, State], gpus: int) -> list[str]:
    """Return a line for each entry on how it stands, and the commands that accept what is finished."""
    lines, accept = [], []
    for entry in entries:
        status, run, reason = states[entry.name]
        if status == evidence.MISSING:
            there = f"there {'is' if gpus == 1 else 'are'} {gpus}"
            reason = f"needs {entry.gpus} GPUs, {there}" if entry.gpus > gpus else "not started"
        elif status == evidence.CUT:
            reason = "goes on when the same command is given again"
        lines.append(f"{status:8}  {entry.name:14}  " + "; ".join(filter(None, [str(run.folder) if run else "", reason])))
        if run and status == evidence.FINISHED:
            accept.append(f"accept with: python -m harness accept {shlex.quote(str(run.folder))}")
    return lines + accept


def exit_code(states: Sequence[State]) -> int:
    """Return PASSED if all runs are there, FAILED if one failed, NOTHING if none is there, else INTERRUPTED: some are left."""
    if any(state.status == evidence.FAILED for state in states):
        return FAILED
    if all(state.there for state in states):
        return PASSED
    return INTERRUPTED if any(state.run for state in states) else NOTHING
