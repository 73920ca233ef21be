"""The page of a run of any kind."""

from pathlib import Path

from harness.report import bench, learning, mutants, parity, sanitizer
from harness.runs.store import Run


def write(run: Run) -> Path:
    """Write report.md, its figures and report.html into the run's folder; return the path of report.md."""
    pages = {"bench": bench, "learn": learning, "mutants": mutants, "sanitize": sanitizer}
    return pages.get(run.about["kind"], parity).write(run)
