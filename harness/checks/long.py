"""Does an hour of video in chunks equal one pass over all of it?

No reference is run over an hour. The truth is one pass of `fused:torch` in float64, plain one pass of the judged implementation
in the case's precision; of 8 frames both have to keep to the rule against the reference itself. An hour is asked on a GPU, in
grid `long`; a minute, in grid `smoke`, shows that the question works.
"""

from dataclasses import replace

import torch

from harness.judge.case import Case
from harness.judge.check import CannotAsk
from harness.judge.implementation import Implementation
from harness.judge.protocols import Subject
from harness.judge.trial import Trial
from harness.records.finding import Finding, Tally

REFERENCE_FRAMES = 8  # of the short video that is judged against the reference
CHUNK = 28  # frames; the last chunk is shorter
MAX_CPU_TOKENS = 10_000


def steps(case: Case) -> float:
    """Return little: of an hour the reference sees only seconds."""
    return case["L"] / 50


def asks(subject: Subject, implementation: Implementation, case: Case) -> bool:
    """Return True of everything but the reference, in cases for it."""
    return case.only_check == "long" and implementation.name != "reference"


def run(trial: Trial, implementation: Implementation) -> list[Finding]:
    """Apply the rule to all tokens' outputs, and to truth and plain in a short video."""
    case, subject, able = trial.case, trial.subject, implementation.abilities
    if able is not None and not able.initial_state:
        raise CannotAsk(f"{implementation.name} does not declare initial_state: no state goes from chunk to chunk")
    if trial.device == "cpu" and case["L"] > MAX_CPU_TOKENS:
        raise CannotAsk(f"{case['L']} tokens take a CPU too long: this is asked on a GPU")
    exact = next(i for i in subject.implementations() if i.name == "fused:torch")
    tally = Tally()
    with torch.no_grad():
        truth = subject.evaluate(exact.call, case, trial.leaves(0, exact=True))
        plain = subject.evaluate(implementation.call, case, trial.leaves(0))
        got = subject.forward_chunked(implementation.call, case, trial.leaves(0), CHUNK)
    tally.add(f"logits[{case['T']} frames]", got["logits"], plain["logits"], truth["logits"])
    sizes = dict(case.dims) | {"T": REFERENCE_FRAMES, "L": 1 + REFERENCE_FRAMES * (case["S"] // 16) ** 2}
    options = tuple(o for o in case.options if o != "for=long")
    short_trial = Trial(replace(case, dims=tuple(sizes.items()), options=options), trial.device)
    for seed in short_trial.seeds:
        plain, truth = short_trial.plain(seed, False).outputs, short_trial.truth(seed, False).outputs
        with torch.no_grad():
            for runner, exactly in ((implementation, False), (exact, True)):
                got = subject.evaluate(runner.call, short_trial.case, short_trial.leaves(seed, exactly))["logits"].cpu()
                name = f"logits[{REFERENCE_FRAMES} frames, {'truth' if exactly else 'plain'}]"
                tally.add(name, got.to(plain["logits"].dtype), plain["logits"], truth["logits"])
    return tally.findings()
