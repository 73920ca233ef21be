"""A second process that computes the same things, to see whether they come out the same bit for bit."""

import os
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from harness.judge.case import Case
from harness.judge.plan import Plan
from harness.runs import workers

LIMIT = 600.0  # seconds for one case before the other process counts as stuck


class Elsewhere:
    """Starts the process at the first question and keeps it; it builds its implementations from the same plan."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._pool: ProcessPoolExecutor | None = None

    def digests(self, case: Case, implementation: str) -> dict[str, str]:
        """SHA-256 of outputs and gradients, by name; raises TimeoutError if no answer comes."""
        if self._pool is None:
            self._pool = workers.pool(1)
        try:
            return self._pool.submit(_digests, self._plan, case, implementation).result(timeout=LIMIT)
        except (TimeoutError, BrokenProcessPool):
            self.close()  # the next question gets another process
            raise

    def close(self) -> None:
        """End the process, even if it is stuck."""
        if self._pool is not None:
            workers.end(self._pool)
            self._pool = None


def _digests(plan: Plan, case: Case, implementation: str) -> dict[str, str]:
    """Runs in the other process."""
    os.environ["PYTHONWARNINGS"] = "ignore"
    from harness.judge.trial import Trial
    from harness.runs import environment

    environment.prepare()
    plan.threads_here()
    with plan.planted():
        trial = Trial(case, plan.device)
        return trial.digests(plan.implementations(case.subject)[implementation])
