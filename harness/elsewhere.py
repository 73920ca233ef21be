"""A second process that computes the same things, to see whether they come out the same bit for bit."""

import multiprocessing
import os
import signal
from concurrent.futures import ProcessPoolExecutor

from harness.case import Case
from harness.plan import Plan

LIMIT = 600.0  # seconds for one case before the other process counts as stuck


class Elsewhere:
    """Starts the process at the first question and keeps it; it builds its implementations from the same plan."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._pool: ProcessPoolExecutor | None = None

    def digests(self, case: Case, implementation: str, device: str) -> dict[str, str]:
        """SHA-256 of outputs and gradients, by name; raises TimeoutError if no answer comes."""
        if self._pool is None:
            spawn = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(1, mp_context=spawn, initializer=_leave_interrupts)
        return self._pool.submit(_digests, self._plan, case, implementation, device).result(timeout=LIMIT)

    def close(self) -> None:
        """End the process, even if it is stuck."""
        if self._pool is not None:
            for process in list((self._pool._processes or {}).values()):
                process.terminate()
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool = None


def _leave_interrupts() -> None:
    """Ctrl-C reaches every process of a terminal; ending this one is the first one's business."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _digests(plan: Plan, case: Case, implementation: str, device: str) -> dict[str, str]:
    """Runs in the other process."""
    os.environ["PYTHONWARNINGS"] = "ignore"
    from harness import environment
    from harness.trial import Trial

    environment.prepare()
    plan.threads_here()
    with plan.planted():
        trial = Trial(case, device)
        return trial.digests(plan.implementations(case.subject)[implementation])
