"""The implementation that tests ask most, and the tensors of findings that fail."""

from collections.abc import Iterable

from harness.judge.implementation import Implementation
from harness.judge.registry import subjects
from harness.records.finding import Finding


def ours(subject: str) -> Implementation:
    """Return `fused:torch` of a subject, which runs everywhere."""
    return next(i for i in subjects()[subject].implementations() if i.name == "fused:torch")


def failing(found: Iterable[Finding]) -> set[str]:
    """Return the names of the tensors that fail."""
    return {f.tensor for f in found if not f.passed}
