"""Is the approximate online mode what its definition says, and how far is that from the exact result?"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import reference
from harness.fixtures import functional_modules as modules
from harness.judge.case import Case
from harness.judge.check import CannotAsk
from harness.judge.implementation import Implementation
from harness.judge.protocols import Subject
from harness.judge.trial import Trial, worst_of
from harness.records.finding import Finding, Tally, rms

DEVIATION = "deviation"  # the norm of what is measured and may be anything


def asks(subject: Subject, implementation: Implementation, case: Case) -> bool:
    """Return True of what has the mode, in cases for it."""
    return case.only_check == "forward_approximate" and implementation.name != "reference"


def steps(case: Case) -> float:
    """Return the tokens of the scans: all of them forwards, and backwards in every chunk those that are looked ahead at too."""
    return sum(case["L"] * (2 + look_ahead / chunk) for chunk, look_ahead in chunk_settings(case))


def run(trial: Trial, implementation: Implementation) -> list[Finding]:
    """Apply the rule against the reference's definition in float64; measure the distance from the exact tokens, without a
    budget."""
    able = implementation.abilities
    if able is not None and not able.initial_state:
        raise CannotAsk(f"{implementation.name} does not declare initial_state: no state goes from chunk to chunk")
    case, plain = trial.case, trial.reference

    def tokens(runner: Implementation, exact: bool, seed: int, how: Callable[[Any, Tensor], Tensor]) -> Tensor:
        leaves = trial.leaves(seed, exact)
        model = modules.on_meta(trial.subject.build, runner.call, case)
        with torch.no_grad(), modules.precision(case, leaves):
            return modules.call(model, leaves, how, leaves["clip"]).cpu()

    def truth_and_plain(seed: int, approximation: Callable[[Any, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        return tokens(plain, True, seed, approximation), tokens(plain, False, seed, approximation)

    exact_tokens = {seed: tokens(implementation, False, seed, at_once).double() for seed in trial.seeds}
    found: list[Finding] = []
    measured: list[Finding] = []
    for chunk, look_ahead in chunk_settings(case):
        approximation, tally, deviations = partial(approximated, chunk, look_ahead), Tally(), []
        for seed, exact in exact_tokens.items():
            key = f"{chunk} frames, {look_ahead} ahead, seed {seed}"
            truth, rounded = trial.cached(key, partial(truth_and_plain, seed, approximation))
            tally.add(f"tokens[{chunk}+{look_ahead}]", tokens(implementation, False, seed, approximation), rounded, truth)
            deviations.append(truth - exact)
        found += tally.findings()
        error, scale = (rms([float(x.norm()) for x in some]) for some in (deviations, exact_tokens.values()))
        measured.append(Finding(f"chunks of {chunk}, {look_ahead} ahead", DEVIATION, error, float("inf"), scale))
    return worst_of(found) + measured


def at_once(model: Any, clip: Tensor) -> Tensor:
    """Return the exact tokens."""
    return model.encode(model.embed(clip))[0]


def approximated(chunk: int, look_ahead: int, model: Any, clip: Tensor) -> Tensor:
    """Return the tokens of chunks of `chunk` frames, with `look_ahead` frames looked ahead at."""
    if isinstance(model, reference.VideoMamba):
        return reference.approximate(model, clip, chunk, look_ahead)
    return torch.cat(list(model.forward_approximate(clip, chunk_frames=chunk, look_ahead=look_ahead)), dim=1)


def chunk_settings(case: Case) -> list[tuple[int, int]]:
    """Return frames of a chunk and frames looked ahead at, powers of 2 up to half of the clip."""
    sizes = [2**k for k in range(case["T"].bit_length() - 1)]
    return [(chunk, look_ahead) for chunk in sizes for look_ahead in (0, *sizes)]
