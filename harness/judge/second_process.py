"""A second process that computes the same results, to see whether they are equal bit for bit."""

import os
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from harness.judge.case import Case
from harness.judge.request import ParityRequest
from harness.judge.trial import Trial
from harness.runs import environment, workers

TIMEOUT = 600.0  # seconds for one case before the second process counts as stuck


class SecondProcess:
    """A process that is started at the first question and kept; it builds its implementations from the same request."""

    def __init__(self, request: ParityRequest) -> None:
        self._request = request
        self._pool: ProcessPoolExecutor | None = None

    def digests(self, case: Case, implementation: str) -> dict[str, str]:
        """Return the SHA-256 of outputs and gradients, by name. Raises TimeoutError if no answer comes."""
        if self._pool is None:
            self._pool = workers.pool(1)
        try:
            return self._pool.submit(_digests, self._request, case, implementation).result(timeout=TIMEOUT)
        except (TimeoutError, BrokenProcessPool):
            self.close()  # the next question gets another process
            raise

    def close(self) -> None:
        """End the process, even if it is stuck."""
        if self._pool is not None:
            workers.end(self._pool)
            self._pool = None


def _digests(request: ParityRequest, case: Case, implementation: str) -> dict[str, str]:
    """Run in the second process."""
    os.environ["PYTHONWARNINGS"] = "ignore"
    environment.prepare()
    request.set_threads()
    with request.planted():
        trial = Trial(case, request.device)
        return trial.digests(request.implementations(case.subject)[implementation])
