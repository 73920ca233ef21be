"""Are the frames that are read from a video file those that a full decode shows?"""

from harness.judge.case import Case
from harness.judge.implementation import Implementation
from harness.judge.protocols import ReadsVideos, Subject
from harness.judge.trial import Trial
from harness.records.finding import Finding


def asks(subject: Subject, implementation: Implementation, case: Case) -> bool:
    """Return True of readers of video files."""
    return isinstance(subject, ReadsVideos)


def run(trial: Trial, implementation: Implementation) -> list[Finding]:
    """Compare a clip with the frames of a full decode."""
    clip = trial.got(implementation, seed=0, grad=False).outputs["clip"]
    return trial.subject.frame_findings(implementation, trial.case, clip)
