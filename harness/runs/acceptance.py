"""Which runs may stand as evidence, and where they are kept."""

import shutil
from pathlib import Path

from harness.records.speed import is_failure
from harness.runs import environment, sessions
from harness.runs.store import Run, StoreError

ACCEPTED = environment.ROOT / "reports" / "accepted"
NARROWING = ("grid", "subjects", "checks", "names", "dtypes", "cases", "races", "points", "tasks", "rooms", "sample", "short")


def commit_of(run: Run) -> str:
    """Return the commit that made a run, which is the one that is checked out.

    Raises StoreError with the reason if the run may not be accepted: `require_evidence` refuses it, or its code is not that of
    the commit as it stands here. A run that asked less than all, or was made on another box, may: `coverage` says so.
    """
    require_evidence(run)
    now = environment.git()
    if now["commit"] is None or now["dirty"]:
        raise StoreError("reference, fused and harness must stand in git as they are here: commit first")
    here = environment.fingerprints()
    if here != run.about["box"]["fingerprints"]:
        others = ", ".join(name for name, value in here.items() if value != run.about["box"]["fingerprints"].get(name))
        raise StoreError(
            f"{run.folder} was made by other code than commit {now['commit'][:10]} ({others} differ); check out what made it"
        )
    return str(now["commit"])


def require_evidence(run: Run) -> None:
    """Raise StoreError with the reason if a run by itself is no evidence, whatever is checked out.

    It is none if it is unfinished, a bug was planted, something of ours failed, its sessions differ in code or box, or its code
    was no commit's or changed during the run.
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
    failed = run.counts()["failed"] + sum(is_failure(speed) for speed in run.speeds)
    if failed:
        raise StoreError(f"{run.folder} is no evidence: {failed} of ours failed, see {run.folder / 'report.md'}")
    if changed := sessions.changed_sources(run.about):
        raise StoreError(f"{run.folder} stands for no code, which changed during the run: {'; '.join(changed)}; run it anew")
    if any(session["box"].get("git", {}).get("dirty") for session in sessions.of(run.about)):
        raise StoreError(f"{run.folder} was made by sources that differed from their commit; commit first, then run it anew")


def coverage(run: Run) -> list[str]:
    """Return a line on what a run was narrowed to by its options, and one on its box if that is another than this."""
    plan, box = run.about["plan"], run.about["box"]
    narrowed = [f"{k} {', '.join(v) if isinstance(v, list | tuple) else v}" for k in NARROWING if (v := plan.get(k))]
    said = [f"covers {run.about['kind']} of {'; '.join(narrowed)}"] if narrowed else []
    if found := sessions.differences(environment.describe(box.get("device", "cpu")), box):
        said.append(f"covers another box than this, {box.get('gpu') or box.get('cpu')}: {'; '.join(found)}")
    return said


def keep(run: Run) -> Path:
    """Copy a run's folder to reports/accepted/DEVICE/NAME; return the copy. Tensors of failing cases are not copied."""
    device = (run.about["box"]["gpu"] or "cpu").lower().replace("nvidia ", "").replace(" ", "-")
    target = ACCEPTED / device / run.folder.resolve().name
    shutil.copytree(run.folder, target, ignore=shutil.ignore_patterns("failing", "*.part"), dirs_exist_ok=True)
    return target
