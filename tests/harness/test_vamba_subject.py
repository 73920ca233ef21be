"""The training of packed captions that the check `convergence` compares: ours passes, planted bugs do not."""

from dataclasses import replace

import pytest
from answers import failing, ours

from harness.checks import convergence
from harness.judge.registry import mutants, subjects
from harness.judge.trial import Trial


@pytest.fixture(scope="module")
def trial():
    """The smoke grid's case, made short."""
    [case] = subjects()["vamba"].special_cases("convergence", "smoke")
    words = tuple("steps=16" if o.startswith("steps=") else o for o in case.options)
    return Trial(replace(case, options=words), "cpu")


def test_a_packed_training_goes_where_it_goes_in_float64(trial):
    found = convergence.run(trial, ours("vamba"))
    assert not failing(found)
    asked = {f.tensor.partition("[")[0] for f in found}
    learnt = {name for name in trial.leaves(0) if name != "clip" and not name.endswith("cross_attn.k_proj.bias")}
    assert {f"grad {name}" for name in learnt if not name.startswith("model.layers.1.vision_mixer")} <= asked
    for mutant in ("vamba_read_all_videos", "vamba_swap_alpha"):
        with mutants()[mutant].plant():
            wrong = failing(convergence.run(trial, ours("vamba")))
        assert "free run" in wrong and len(wrong) > 1, mutant
