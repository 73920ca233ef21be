"""How a run ends: finished or interrupted, always with a report."""

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness.runs.progress import Progress
from harness.runs.store import Run

PASSED, FAILED, USAGE, NOTHING, UNFIT, INTERRUPTED = 0, 1, 2, 3, 4, 130


def conclude(run: Run, progress: Progress, work: Callable[[], None], write: Callable[[Run], Path]) -> bool:
    """Do the work and write the report; whether it came to its end. Ctrl-C keeps what was done."""
    status = "finished"

    def stop(*_: Any) -> None:
        nonlocal status
        status = "interrupted"
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    if before is not signal.SIG_IGN:  # as in the background of a shell
        signal.signal(signal.SIGINT, stop)
    try:
        with progress:
            work()
    except KeyboardInterrupt:
        status = "interrupted"
    except BaseException:  # a RuntimeError where Ctrl-C came while Python released a lock
        if status == "finished":
            signal.signal(signal.SIGINT, before)
            raise
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C must not cost the report of what was done
    run.finish(status)
    print(f"report: {write(run)}")
    signal.signal(signal.SIGINT, before)
    if status == "interrupted":
        print(f"interrupted; {run.continued}")
    return status == "finished"


def exit_code(run: Run) -> int:
    """Of records that were judged: whether one of ours failed, or nothing ran, rivals' included."""
    ours, rivals = run.counts(), run.counts("rival")
    if not any(counts[k] for counts in (ours, rivals) for k in ("passed", "failed")):
        return NOTHING
    return FAILED if ours["failed"] else PASSED
