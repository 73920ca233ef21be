"""`python -m harness sanitize`."""

import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Annotated

import typer

from harness.cli.options import Names, Out, Resume
from harness.instruments import sanitizer
from harness.judge.registry import subjects
from harness.judge.request import require_device, require_known
from harness.records.finding import Finding
from harness.records.record import Record
from harness.report import sanitizer as page
from harness.runs import environment, workers
from harness.runs.conclude import INTERRUPTED, UNFIT, conclude, exit_code
from harness.runs.progress import Progress
from harness.runs.store import begin, require_writable, unfinished

IMPLEMENTATION = "fused:native"
DEFAULT = ("memcheck", "racecheck", "synccheck")
SECONDS = 900.0  # that one tool may take for one subject


def sanitize(
    tool: Annotated[Names, typer.Option(help=f"{', '.join(sanitizer.TOOLS)}; by default all but the last")] = None,
    subject: Annotated[Names, typer.Option(help="by default all that have kernels of this project")] = None,
    out: Out = None,
    resume: Resume = False,
    jobs: Annotated[int, typer.Option(min=0, help="programs that are watched at once; 0 chooses")] = 0,
) -> None:
    """Run every native kernel at small sizes under NVIDIA's compute-sanitizer; exits 0 if it finds nothing, 1 if it does.

    memcheck finds accesses outside of memory, racecheck races in shared memory, synccheck wrong barriers, and initcheck reads
    of memory that was never written. Needs a GPU and CUDA's toolkit; exits 4 where these are missing.
    """
    require_writable(out)
    native = [name for name, s in subjects().items() if any(i.name == IMPLEMENTATION for i in s.implementations())]
    require_known("tool", tool or (), sanitizer.TOOLS)
    require_known("subject", subject or (), native)
    if sanitizer.program() is None:
        print("compute-sanitizer is not on the PATH: it comes with CUDA's toolkit", file=sys.stderr)
        raise typer.Exit(UNFIT)
    require_device("cuda")
    earlier = unfinished(out, "sanitize") if resume else None
    plan = {"checks": tool or [], "subjects": subject or []}
    run = begin({"kind": "sanitize", "plan": plan, "box": environment.describe("cuda")}, sys.argv[1:], out, earlier)
    asked = [(t, s) for s in subject or native for t in tool or DEFAULT]
    left = [pair for pair in asked if pair not in {(r.check, r.subject) for r in run.records}]
    print(f"{len(asked)} questions, into {run.folder}", flush=True)
    progress = Progress({" ".join(pair): 1.0 for pair in left})

    def work() -> None:
        pool = ThreadPoolExecutor(jobs or workers.processes_for("cuda"))
        try:
            for future in as_completed([pool.submit(ask, *pair) for pair in left]):
                record = future.result()
                run.add(record)
                if record.failed:
                    progress.say(f"{record.status.upper()} {record.check} {record.subject}: {page.said(record)}")
                progress.done(f"{record.check} {record.subject}", f"{record.check} {record.subject}")
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            sanitizer.end()

    done = conclude(run, progress, work, page.write)
    print(run.last_line())
    raise typer.Exit(exit_code(run) if done else INTERRUPTED)


def ask(tool: str, subject: str) -> Record:
    """Return the record of one tool on one subject."""
    start = time.monotonic()
    errors, said = sanitizer.watch(tool, subject, SECONDS)
    found = (Finding("all kernels", "errors", float(errors), 0.0, note=said),) if errors >= 0 else ()
    status = "error" if errors < 0 else "fail" if errors else "pass"
    command = f"python -m harness sanitize --tool {tool} --subject {subject}"
    seconds, reason = round(time.monotonic() - start, 1), said if errors < 0 else ""
    return Record(subject, IMPLEMENTATION, "ours", tool, "smoke", "", status, seconds, reason, found, command)
