"""Which runs may stand as evidence, and where they are kept."""

import shutil
from pathlib import Path

from fused import stamp
from harness.runs import environment, sessions
from harness.runs.store import Run, StoreError

ACCEPTED = environment.ROOT / "reports" / "accepted"


def commit_of(run: Run) -> str:
    """Return the commit that made a run, which is the one that is checked out.

    Raises StoreError with the reason if the run may not be accepted: it is unfinished, a bug was planted, its sessions differ
    in code or box, or its code is not that of the commit as it stands here.
    """
    status, mutant = run.about.get("status"), run.about["plan"].get("mutant")
    if mutant:
        raise StoreError(f"{run.folder} is not a run of the product itself: the bug {mutant} was planted")
    if status != "finished":
        raise StoreError(f"{run.folder} is not a finished run (status: {status}); {run.how_to_continue}")
    for number, session in enumerate(sessions.of(run.about), 1):
        if found := sessions.differences(run.about["box"], session["box"]):
            raise StoreError(
                f"{run.folder} mixes two codes or boxes: session {number}, started {session['started']}, differs in "
                f"{'; '.join(found)}; run it anew, without --resume, on one box from one code"
            )
    now = environment.git()
    if now["commit"] is None or now["dirty"]:
        raise StoreError("reference, fused and harness must stand in git as they are here: commit first")
    here = {name: stamp.fingerprint(name) for name in ("reference", "fused", "harness")}
    if here != run.about["box"]["fingerprints"]:
        others = ", ".join(name for name, value in here.items() if value != run.about["box"]["fingerprints"].get(name))
        raise StoreError(
            f"{run.folder} was made by other code than commit {now['commit'][:10]} ({others} differ); check out what made it"
        )
    return str(now["commit"])


def keep(run: Run) -> Path:
    """Copy a run's folder to reports/accepted/DEVICE/NAME; return the copy. Tensors of failing cases are not copied."""
    device = (run.about["box"]["gpu"] or "cpu").lower().replace("nvidia ", "").replace(" ", "-")
    target = ACCEPTED / device / run.folder.resolve().name
    shutil.copytree(run.folder, target, ignore=shutil.ignore_patterns("failing", "*.part"), dirs_exist_ok=True)
    return target
