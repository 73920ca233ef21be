"""The members of a check.

A check is a module in `harness/checks/`: a question with a yes or no answer, asked of (subject, implementation, case). Its
name and title come from the file, as a subject's do. It must have all that `Check` lists; `HasCost` is optional.
"""

from typing import Protocol, cast, runtime_checkable

from harness.judge.case import Case
from harness.judge.implementation import Implementation
from harness.judge.protocols import Subject
from harness.judge.registry import modules_of
from harness.judge.trial import Trial
from harness.records.finding import Finding


class CannotAsk(Exception):
    """The check has no question at this point; the message says why, and the record is a skip."""


class Check(Protocol):
    """The members of a check."""

    __name__: str
    __doc__: str | None

    def asks(self, subject: Subject, implementation: Implementation, case: Case) -> bool:
        """Return whether it is asked at this point."""

    def run(self, trial: Trial, implementation: Implementation) -> list[Finding]:
        """Return findings, one at least. Raises CannotAsk where the box or the implementation has nothing to ask."""


@runtime_checkable
class HasCost(Protocol):
    """A check whose cases do not cost what the subject's do."""

    def steps(self, case: Case) -> float:
        """Return the cost of a case's truth, in steps of a scan."""


def checks() -> dict[str, Check]:
    """Return the checks by name: the modules of `harness/checks/`."""
    return cast(dict[str, Check], modules_of("harness.checks"))
