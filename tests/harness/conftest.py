"""For tests that ask the judge the same things again and again."""

import functools
from collections.abc import Callable

import pytest

from harness import parity
from harness.case import Case
from harness.trial import Trial


@functools.cache
def _kept(case: Case, device: str) -> Trial:
    return Trial(case, device)


def _known(case: Case, device: str, elsewhere: Callable[[Case, str], dict[str, str]]) -> Trial:
    trial = _kept(case, device)
    trial._elsewhere = elsewhere
    return trial


@pytest.fixture
def answered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a case the reference, which no bug of `fused` reaches, is asked once; on CPUs its loops are most of a run's cost."""
    monkeypatch.setattr(parity, "Trial", _known)
