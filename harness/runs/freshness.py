"""How far the code of an accepted run is from the code as it stands here."""

import subprocess
from collections.abc import Sequence

from harness.runs.environment import ROOT
from harness.runs.store import Run

SOURCES = ("reference", "fused", "harness")
OTHERS = ("harness/report", "harness/source_mutants", "*.md")  # not of them


def changed_since(run: Run) -> tuple[str, ...] | None:
    """Return the source files that differ from the commit of an accepted run, sorted; None where git cannot tell.

    Pages and planted bugs are no sources of a result: `harness/report` and `harness/source_mutants` do not count.
    """
    commit = run.about.get("commit")
    if not commit:
        return None
    words = ["git", "diff", "--name-only", commit, "--", *SOURCES, *(f":!{path}" for path in OTHERS)]
    try:
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return tuple(sorted(done.stdout.split())) if done.returncode == 0 else None


def in_words(changed: Sequence[str] | None) -> str:
    """Return whether a run speaks for the code as it stands here, with the folders that changed most."""
    if changed is None:
        return "unknown: its commit is not in this checkout"
    if not changed:
        return "of this code"
    folders: dict[str, int] = {}
    for path in changed:
        folder = "/".join(path.split("/")[: min(3, path.count("/"))])
        folders[folder] = folders.get(folder, 0) + 1
    most = sorted(folders, key=lambda name: -folders[name])[:4]
    files = f"{len(changed)} {'file' if len(changed) == 1 else 'files'}"
    return f"older: {files} changed since, {', '.join(f'{name} ({folders[name]})' for name in most)}"
