"""Does `forward_chunked` equal the whole clip, whatever the length of a chunk, in inference and in training?"""


from harness.judge.case import Case
from harness.judge.check import CannotAsk
from harness.judge.implementation import Implementation
from harness.judge.protocols import ChunkedModel, Subject
from harness.judge.trial import Trial, worst_of
from harness.records.finding import Finding, Tally

REFERENCE_TOKENS = 16  # up to this length the reference is judged too; it is slow in chunks


def asks(subject: Subject, implementation: Implementation, case: Case) -> bool:
    """Return True of models of more than one tubelet; of the reference in short cases in float32."""
    if not isinstance(subject, ChunkedModel) or case.dtype == "float64" or not subject.chunk_frames(case):
        return False
    return implementation.name != "reference" or (case["L"] <= REFERENCE_TOKENS and case.dtype == "float32")


def run(trial: Trial, implementation: Implementation) -> list[Finding]:
    """Judge outputs and gradients in training; and outputs without gradients being recorded, where results go in place."""
    able = implementation.abilities
    if able is not None and not able.initial_state:
        raise CannotAsk(f"{implementation.name} does not declare initial_state: no state goes from chunk to chunk")
    shortest, *others = trial.subject.chunk_frames(trial.case)
    ways = [(shortest, False)] + [(frames, True) for frames in (shortest, *others) if trial.asks_gradients]
    found = []
    for frames, grad in ways:
        tally = Tally()
        for seed in trial.seeds:
            plain, truth = trial.plain(seed, grad).named(), trial.truth(seed, grad).named()
            got = trial.run(implementation, seed, grad, trial.leaves(seed), frames=frames).named()
            for name, exact in truth.items():
                if grad or not name.startswith("grad "):
                    part = f"{name}[chunks of {frames}, {'training' if grad else 'inference'}]"
                    tally.add(part, got.get(name), plain[name], exact)
        found += tally.findings()
    return worst_of(found)
