"""For tests that ask the judge itself: as its runs set the process up, and the same things again and again."""

import functools
import multiprocessing
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch
from matplotlib.figure import Figure

from harness.bench import worker
from harness.judge import parity
from harness.judge.case import Case
from harness.judge.trial import Trial
from harness.runs import environment


@functools.cache
def _kept(case: Case, device: str) -> Trial:
    return Trial(case, device)


def _known(case: Case, device: str, second_process: Callable[[Case, str], dict[str, str]]) -> Trial:
    trial = _kept(case, device)
    trial._second_process = second_process
    return trial


@pytest.fixture
def answered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a case the reference, which no bug of `fused` reaches, is asked once; on CPUs its loops are most of a run's cost."""
    monkeypatch.setattr(parity, "Trial", _known)


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are made, but not drawn, which takes most of a page's time."""
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **_: path.write_text("<svg/>"))


@pytest.fixture
def forked_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that time are copies of this one, which has imported PyTorch: that takes each of them seconds."""
    fork = multiprocessing.get_context("fork")
    monkeypatch.setattr(worker, "multiprocessing", SimpleNamespace(get_context=lambda kind: fork))


@pytest.fixture
def prepared() -> Iterator[None]:
    """The settings under which parity judges, for one test."""
    before = torch.are_deterministic_algorithms_enabled()
    environment.prepare()
    yield
    torch.use_deterministic_algorithms(before)
