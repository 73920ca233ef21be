"""Does an hour of video in chunks equal one pass over all of it?

No reference is run over an hour. Truth is one pass of `fused:torch` in float64, plain one pass of the implementation asked, in
the case's precision; of 8 frames both have to keep to the rule against the reference itself. An hour is asked on a GPU, in
grid `long`; a minute, in grid `smoke`, shows that the question works.
"""

from dataclasses import replace
from types import ModuleType

import torch

from harness.fixtures import functional_modules as modules
from harness.judge.case import Case
from harness.judge.registry import CannotAsk, Implementation
from harness.judge.trial import Trial
from harness.records.finding import Finding, Tally

FEW = 8  # frames for which the reference is asked
CHUNK = 28  # frames; the last chunk is shorter
MOST = 10_000  # tokens that a CPU is asked for


def cases(grid: str) -> list[Case]:
    """One draw is enough: there is an output for every token."""
    T, S, D = {"smoke": (64, 32, 32), "long": (3600, 224, 192)}.get(grid, (0, 0, 0))
    shape = {"B": 1, "T": T, "S": S, "D": D, "L": 1 + T * (S // 16) ** 2}
    found = modules.precisions([(shape, ("readout=tokens", "infer", "for=long"))], "videomamba", half=False)
    return found if grid == "long" else found[:1] if T else []


def steps(case: Case) -> float:
    """Of an hour the reference sees but seconds."""
    return case["L"] / 50


def asks(subject: ModuleType, implementation: Implementation, case: Case) -> bool:
    """Of everything but the reference, in the cases above."""
    return case.asker == "long" and implementation.name != "reference"


def run(trial: Trial, implementation: Implementation) -> list[Finding]:
    """The rule for all tokens' outputs, and for what they are held against."""
    case, subject, able = trial.case, trial.subject, implementation.abilities
    if able is not None and not able.initial_state:
        raise CannotAsk(f"{implementation.name} does not declare initial_state: no state goes from chunk to chunk")
    if trial.device == "cpu" and case["L"] > MOST:
        raise CannotAsk(f"{case['L']} tokens take a CPU too long: this is asked on a GPU")
    exact = next(i for i in subject.implementations() if i.name == "fused:torch")
    tally = Tally()
    with torch.no_grad():
        truth = subject.evaluate(exact.call, case, trial.leaves(0, exact=True))
        plain = subject.evaluate(implementation.call, case, trial.leaves(0))
        got = subject.in_chunks(implementation.call, case, trial.leaves(0), CHUNK)
    tally.add(f"logits[{case['T']} frames]", got["logits"], plain["logits"], truth["logits"])
    short = dict(case.dims) | {"T": FEW, "L": 1 + FEW * (case["S"] // 16) ** 2}
    options = tuple(o for o in case.options if o != "for=long")
    few = Trial(replace(case, dims=tuple(short.items()), options=options), trial.device)
    for seed in few.case.seeds:
        plain, truth = few.plain(seed, False).outputs, few.truth(seed, False).outputs
        with torch.no_grad():
            for who, exactly in ((implementation, False), (exact, True)):
                got = subject.evaluate(who.call, few.case, few.leaves(seed, exactly))["logits"].cpu()
                name = f"logits[{FEW} frames, {'truth' if exactly else 'plain'}]"
                tally.add(name, got.to(plain["logits"].dtype), plain["logits"], truth["logits"])
    return tally.findings()
