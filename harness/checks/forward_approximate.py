"""Is the approximate online mode what its definition says, and how far is that from the exact result?"""

from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

import reference
from harness.fixtures import functional_modules as modules
from harness.judge.case import Case
from harness.judge.registry import CannotAsk, Implementation
from harness.judge.trial import Trial, worst_of
from harness.records.finding import Finding, Tally, rms

DEVIATION = "deviation"  # the norm of what is measured and may be anything


def cases(grid: str) -> list[Case]:
    """Frames of the video through models of two layers."""
    T, S, D = (4, 32, 32) if grid == "smoke" else (16, 64, 192)
    shape = {"B": 1, "T": T, "S": S, "D": D, "L": 1 + T * (S // 16) ** 2}
    return modules.precisions([(shape, ("video", "infer", "for=forward_approximate"))], "videomamba", half=False)


def asks(subject: ModuleType, implementation: Implementation, case: Case) -> bool:
    """Of what has the mode, in the cases above."""
    return case.asker == "forward_approximate" and implementation.name != "reference"


def steps(case: Case) -> float:
    """Tokens of the scans: all of them forwards, and backwards in every chunk those that are looked ahead at too."""
    return sum(case["L"] * (2 + ahead / chunk) for chunk, ahead in ways(case))


def run(trial: Trial, implementation: Implementation) -> list[Finding]:
    """The rule against the reference's definition in float64, and the distance from the exact tokens, not held to anything."""
    able = implementation.abilities
    if able is not None and not able.initial_state:
        raise CannotAsk(f"{implementation.name} does not declare initial_state: no state goes from chunk to chunk")
    case, plain = trial.case, trial.reference

    def tokens(who: Implementation, exact: bool, seed: int, how: Callable[[Any, Tensor], Tensor]) -> Tensor:
        leaves = trial.leaves(seed, exact)
        model = modules.on_meta(trial.subject.build, who.call, case)
        with torch.no_grad(), modules.precision(case, leaves):
            return modules.call(model, leaves, how, leaves["clip"]).cpu()

    def due(seed: int, near: Callable[[Any, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        return tokens(plain, True, seed, near), tokens(plain, False, seed, near)

    wholes = {seed: tokens(implementation, False, seed, at_once).double() for seed in case.seeds}
    found: list[Finding] = []
    measured: list[Finding] = []
    for chunk, ahead in ways(case):
        near, tally, deviations = partial(approximated, chunk, ahead), Tally(), []
        for seed, whole in wholes.items():
            truth, rounded = trial.once(f"{chunk} frames, {ahead} ahead, seed {seed}", partial(due, seed, near))
            tally.add(f"tokens[{chunk}+{ahead}]", tokens(implementation, False, seed, near), rounded, truth)
            deviations.append(truth - whole)
        found += tally.findings()
        error, scale = (rms([float(x.norm()) for x in some]) for some in (deviations, wholes.values()))
        measured.append(Finding(f"chunks of {chunk}, {ahead} ahead", DEVIATION, error, float("inf"), scale))
    return worst_of(found) + measured


def at_once(model: Any, clip: Tensor) -> Tensor:
    """The exact tokens."""
    return model.encode(model.embed(clip))[0]


def approximated(chunk: int, ahead: int, model: Any, clip: Tensor) -> Tensor:
    """Tokens of chunks of so many frames, with so many looked ahead at."""
    if isinstance(model, reference.VideoMamba):
        return reference.approximate(model, clip, chunk, ahead)
    return torch.cat(list(model.forward_approximate(clip, chunk_frames=chunk, look_ahead=ahead)), dim=1)


def ways(case: Case) -> list[tuple[int, int]]:
    """Frames of a chunk and frames looked ahead at, powers of 2 up to half of the clip."""
    sizes = [2**k for k in range(case["T"].bit_length() - 1)]
    return [(chunk, ahead) for chunk in sizes for ahead in (0, *sizes)]
