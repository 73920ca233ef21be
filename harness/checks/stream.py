"""Does a `FrameStream`, on a GPU by its CUDA graph, give frame by frame what the whole video gives?"""


from harness.checks.chunks import cut
from harness.judge.case import Case
from harness.judge.implementation import Implementation
from harness.judge.protocols import FrameByFrame, Subject
from harness.judge.trial import Trial, worst_of
from harness.records.finding import Finding, Tally


def asks(subject: Subject, implementation: Implementation, case: Case) -> bool:
    """Return True of causal classifiers that are cut between tubelets, in their chunks' cases."""
    if not isinstance(subject, FrameByFrame) or case.dtype == "float64" or implementation.name == "reference":
        return False
    return case.has("state") and subject.cut_by_tubelets(case)


def run(trial: Trial, implementation: Implementation) -> list[Finding]:
    """Apply the rule to what each tubelet adds to the output by itself."""
    case, tally = trial.case, Tally()
    axis, count = trial.subject.time_axes(case).get("logits"), trial.subject.num_units(case)
    edges = [(i, i + 1) for i in range(count)] if axis is not None else [(0, count)]
    for seed in trial.seeds:
        plain, truth = trial.plain(seed, False).outputs["logits"], trial.truth(seed, False).outputs["logits"]
        got = trial.subject.frame_by_frame(implementation.call, case, trial.leaves(seed))["logits"].cpu()
        for start, stop in edges:
            parts = (t if axis is None else cut(t, axis, start, stop, count) for t in (got, plain, truth))
            tally.add(f"logits[{start}:{stop}]", *parts)
    return worst_of(tally.findings())
