"""The end of a run: finished or interrupted, always with a report."""

import signal
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from harness.runs import environment, sessions
from harness.runs.progress import Progress
from harness.runs.store import Run

PASSED, FAILED, USAGE, NOTHING, UNFIT, INTERRUPTED = 0, 1, 2, 3, 4, 130
SIGNALS = (signal.SIGINT, signal.SIGTERM)  # Ctrl-C, and what `timeout` and batch systems send
SAME_STOP = 2.0  # seconds within which further signals count as the same one: `timeout` sends two


def conclude(run: Run, progress: Progress, work: Callable[[], None], write: Callable[[Run], Path]) -> bool:
    """Do the work and write the report; return whether the work came to its end. Ctrl-C and SIGTERM keep what was done."""
    status, stopped = "finished", -SAME_STOP

    def stop(*_: Any) -> None:
        nonlocal status, stopped
        if time.monotonic() - stopped > SAME_STOP:  # else the first is still unwinding, and ends processes on its way
            status, stopped = "interrupted", time.monotonic()
            raise KeyboardInterrupt

    heard = [s for s in SIGNALS if signal.getsignal(s) is not signal.SIG_IGN]  # a shell's background ignores Ctrl-C
    before = {s: signal.signal(s, stop) for s in heard}
    try:
        with progress:
            work()
    except KeyboardInterrupt:
        status = "interrupted"
    except BaseException:  # a RuntimeError where Ctrl-C came while Python released a lock
        if status == "finished":
            _restore(before)
            raise
    for s in heard:
        signal.signal(s, signal.SIG_IGN)  # a second Ctrl-C must not cost the report of what was done
    changed = sessions.edited(run.about, environment.fingerprints())
    run.finish(status, changed)
    print(f"report: {write(run)}", flush=True)
    if changed:
        print(f"sources changed during the run, which therefore stands for no code: {'; '.join(changed)}", flush=True)
    _restore(before)
    if status == "interrupted":
        print(f"interrupted; {run.how_to_continue}", flush=True)
    return status == "finished"


def nothing_ran(reasons: Iterable[str]) -> int:
    """Print why nothing ran, a line a reason, and return NOTHING."""
    print("nothing ran:", *(dict.fromkeys(reasons) or ["the options leave no question"]), sep="\n    ")
    return NOTHING


def exit_code(run: Run) -> int:
    """Return FAILED if one of ours failed, NOTHING if nothing was judged, rivals included, else PASSED."""
    ours, rivals = run.counts(), run.counts("rival")
    if not any(counts[k] for counts in (ours, rivals) for k in ("passed", "failed")):
        return NOTHING
    return FAILED if ours["failed"] else PASSED


def _restore(before: dict[signal.Signals, Any]) -> None:
    """Set the handlers of signals back."""
    for s, handler in before.items():
        signal.signal(s, handler or signal.SIG_DFL)
