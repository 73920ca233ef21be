"""The page of a sweep."""

from pathlib import Path

from harness.report import tables
from harness.store import Run


def write(run: Run) -> Path:
    """Write report.md into the run's folder."""
    rows = [(*s.key, f"{1e3 * s.median.middle:.4g}" if s.seconds else s.status) for s in run.speeds]
    path = run.folder / "report.md"
    path.write_text(tables.table(["entry", "point", "ms"], rows) + "\n")
    return path
