"""Which parity runs validate a backend, and the stamps that they leave in the user's cache for `fused.validation`."""

import json
from dataclasses import fields
from typing import Any

from fused import stamp
from fused.backends import operators_of
from harness.judge.case import DTYPES
from harness.judge.request import ParityRequest
from harness.runs import environment, sessions
from harness.runs.store import Run


def request_of(run: Run) -> ParityRequest:
    """Return the request that a run recorded at its start."""
    recorded = {f.name: run.about["plan"][f.name] for f in fields(ParityRequest) if f.name in run.about["plan"]}
    plan: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in recorded.items()}
    return ParityRequest(**plan)


def unanswered(run: Run) -> int:
    """Return how many questions of a run have no record; those of absent implementations count as answered."""
    request, answered = request_of(run), {r.key for r in run.records}
    absent = {r.key[:2] for r in run.records if r.check == "all"}
    keys = ((case.subject, i.name, check, case.name) for case in request.selected_cases()
            for check, _, i in request.questions(case))  # fmt: skip
    return sum(key not in answered and key[:2] not in absent for key in keys)


def refusal(run: Run) -> str | None:
    """Return why a run validates nothing; None if it may.

    A stamp speaks for the sources and the box that run.json recorded at the start, so these must be what is here now, and what
    every session had.
    """
    request, about = request_of(run), run.about
    if request.mutant:
        return f"the bug {request.mutant} was planted"
    if request.filtered:
        return "it is filtered: less was asked than all of the full grid"
    if request.added or request.rivals:
        return "--with and --rival change who is judged"
    if about.get("status") != "finished":
        return f"it is not finished (status: {about.get('status')})"
    if failed := run.counts()["failed"]:
        return f"{failed} questions of ours failed"
    if left := unanswered(run):
        return f"{left} questions have no answer"
    if about["box"].get("git", {}).get("dirty"):
        return "its sources were not those of a commit: commit first, then run it again"
    if changed := sessions.changed_sources(about):
        return f"sources changed during the run: {'; '.join(changed)}"
    here = json.loads(json.dumps(environment.describe(request.device)))
    for box, what in (*((s["box"], "its sessions differ") for s in sessions.of(about)), (here, "it was made elsewhere")):
        if found := sessions.differences(about["box"], box):
            return f"{what}: {'; '.join(found)}"
    return None


def write_stamps(run: Run) -> list[tuple[str, str]]:
    """Write a stamp for each of our backends and dtypes that passed, with the fingerprints of the run's start; return them.

    Nothing is written where `refusal` has a reason.
    """
    if refusal(run) is not None:
        return []
    written = []
    judged = sorted({(r.implementation, r.dtype) for r in run.records if r.role == "ours" and r.dtype})
    for name, dtype in judged:
        backend = name.removeprefix("fused:")
        names = {name, f"fused:{operators_of(backend)}"}
        checked = {r.check for r in run.records if r.implementation in names and r.dtype == dtype and r.status == "pass"}
        if backend == name or not checked:
            continue
        values = stamp.key(backend, DTYPES[dtype], run.about["plan"]["device"]) | run.about["box"]["fingerprints"]
        passed = stamp.Validation(**values, run=run.folder.name, date=run.about["ended"], checks=tuple(sorted(checked)))
        stamp.write_validation(passed)
        written.append((backend, dtype))
    return written
