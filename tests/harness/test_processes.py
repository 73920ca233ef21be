"""The check `processes`: trainings of ours pass, bugs of two processes do not, and a process that fails says why."""

import functools
from pathlib import Path

import faulty
import pytest
import torch
from answers import failing, ours

from harness.checks import processes
from harness.instruments import two_processes
from harness.instruments.two_processes import Training
from harness.judge.check import CannotAsk
from harness.judge.registry import subjects
from harness.judge.trial import Trial

pytestmark = pytest.mark.usefixtures("prepared")


@functools.cache
def trial(subject: str, device: str = "cpu") -> Trial:
    """The truth is computed once."""
    return Trial(subjects()[subject].special_cases("processes", "full")[0], device)


@pytest.mark.parametrize("subject", ["videomamba", "encoder"])
def test_ours_passes(subject: str) -> None:
    """All parameters of the classifier are asked about, and in both ways."""
    found = processes.run(trial(subject), ours(subject))
    assert not failing(found)
    asked = {f.tensor for f in found}
    for engine in processes.ENGINES:
        assert {f"loss, {engine}", f"log loss, {engine} again"} <= asked
    if subject == "videomamba":
        parameters = {f.removeprefix("model.").removesuffix(" again") for f in asked if f.startswith("model.")}
        assert parameters and {f"grad {name}" for name in parameters} <= asked


def test_planted_bugs_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients that DDP leaves apart, moments that FSDP2 forgets: each fails in the place where it is."""
    planted = functools.partial(two_processes.run_trainings, plant=faulty.in_processes)
    monkeypatch.setattr(two_processes, "run_trainings", planted)
    found = failing(processes.run(trial("videomamba"), ours("videomamba")))
    assert {name for name in found if name.startswith("grad ") and name.endswith(", ddp")}
    assert not {name for name in found if name.endswith(", fsdp")}
    assert "log grad_norm, fsdp again" in found and "log loss, fsdp again" in found


def test_what_cannot_be_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """One GPU is a reason to ask nothing; on the smoke grid nobody is asked."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(CannotAsk, match="needs two GPUs, there is 1"):
        processes.run(trial("encoder", "cuda"), ours("encoder"))
    assert not any(subjects()[s].special_cases("processes", "smoke") for s in ("videomamba", "encoder"))


def test_a_process_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong word ends both; so does the limit, with one that waits."""
    wrong = Training((f"out={tmp_path}", "task=dream", "data.train=nowhere"))
    with pytest.raises(RuntimeError, match=r"exit code 2(.|\n)*task is 'dream'; allowed"):
        two_processes.run_trainings([wrong], tmp_path)
    monkeypatch.setattr(two_processes, "TIMEOUT", 0.0)
    with pytest.raises(RuntimeError, match="not ended"):
        two_processes.run_trainings([wrong], tmp_path)
