"""The check `convergence`: what trains like the reference passes, planted bugs do not, and the report shows the curves."""

import math
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from answers import failing, ours

from harness.checks import convergence
from harness.judge.check import CannotAsk
from harness.judge.implementation import Implementation
from harness.judge.parity import ask
from harness.judge.registry import mutants, subjects
from harness.judge.request import ParityRequest
from harness.judge.trial import Trial
from harness.report import parity as page
from harness.report import training
from harness.runs.store import Run

SHORT = 15  # steps: enough for the truth to learn
MUTANTS = ("keep_the_weights", "add_up_gradients")


pytestmark = pytest.mark.usefixtures("prepared")


@lru_cache
def trial(subject: str) -> Trial:
    """The smoke grid's case of a subject, made short; truth and plain are computed once."""
    [case] = subjects()[subject].special_cases("convergence", "smoke")
    words = tuple(f"steps={SHORT}" if o.startswith("steps=") else o for o in case.options)
    return Trial(replace(case, options=words), "cpu")


@pytest.mark.parametrize("subject", ["videomamba", "encoder"])
def test_ours_passes_and_planted_bugs_do_not(subject: str) -> None:
    """Float32 and autocast; each bug shows in single steps and in the free run. No parameter of the classifier is left out."""
    found = convergence.run(trial(subject), ours(subject))
    assert not failing(found)
    asked = {f.tensor.partition("[")[0] for f in found}
    assert {"loss", "loss after the step", "free run", "loss that the truth keeps"} <= asked
    if subject == "videomamba":
        assert {f"grad {k}" for k in trial(subject).leaves(0) if k != "clip"} <= asked
    for mutant in MUTANTS:
        with mutants()[mutant].plant():
            wrong = failing(convergence.run(trial(subject), ours(subject)))
        assert mutants()[mutant].FAILS == ("convergence", "free run") and "free run" in wrong and len(wrong) > 1, mutant


def test_what_cannot_be_judged_is_not_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A truth that does not learn is a reason to ask nothing."""
    trainings = trial("encoder").cached(convergence.NAME, lambda: convergence.train_reference(trial("encoder")))
    monkeypatch.setattr(convergence, "LEARNT", trainings.kept / 2)
    with pytest.raises(CannotAsk, match="does not learn"):
        convergence.run(trial("encoder"), ours("encoder"))


def test_records_survive_and_are_drawn(tmp_path: Path) -> None:
    """One that passes and one that is never a number, through JSON into the report."""

    def never_a_number(config: dict[str, Any]) -> torch.nn.Module:
        model = ours("videomamba").call(config)
        model.register_forward_hook(lambda module, given, logits: logits * torch.nan)
        return model

    request = ParityRequest("smoke", "cpu")
    run = Run.create(tmp_path / "run", {"kind": "parity", "plan": asdict(request), "box": {}})
    for who in (ours("videomamba"), Implementation("mine", never_a_number)):
        run.add(ask(request, trial("videomamba"), convergence.NAME, convergence, who))
    run.finish("finished")
    good, bad = Run.open(run.folder).records
    assert (good.status, bad.status) == ("pass", "fail")
    lines = training.curves(good)
    assert {"free run", "loss, truth", "loss, plain", "loss, got", *(f"plain run {i}" for i in (1, 2, 3, 4))} == set(lines)
    assert all(len(line) == SHORT + 1 for line in lines.values())
    assert lines["free run"][0] == 0 < lines["free run"][1] and math.isinf(training.curves(bad)["free run"][1])
    assert [f.passed for f in bad.findings if f.tensor == "free run"] == [False]
    text = page.write(run).read_text()
    assert "](convergence-1-loss.svg)" in text and "which quarter" in text and "; 1 failed](" in text
    loss, distance = ((run.folder / f"convergence-1-{what}.svg").read_text() for what in ("loss", "distance"))
    assert all(word in loss for word in ("ours in plain PyTorch", ">mine<", "loss of the step", "reference, float64"))
    assert "shaded: allowed" in distance
    assert training.trainings([replace(good, check="forward")], tmp_path) == []
