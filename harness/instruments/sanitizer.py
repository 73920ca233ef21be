"""NVIDIA's compute-sanitizer over the native kernels: accesses outside of memory, races in shared memory, barriers."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import NamedTuple

from harness.runs import environment

TOOLS = {  # each with its options
    "memcheck": ("--leak-check=no", "--report-api-errors=no"), "racecheck": ("--racecheck-report=all",), "synccheck": (),
    "initcheck": (),
}  # fmt: skip
SHOWN = 10  # lines of the first report that are kept
SUMMARY = re.compile(r"^=+ (?:ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard)", re.M)


class Verdict(NamedTuple):
    """The result of one tool on one subject: errors found, -1 if the tool gave no count; the reason, or the first report."""

    errors: int
    said: str


def program() -> str | None:
    """Return the path of compute-sanitizer: on the PATH, or in CUDA's usual folder; None where there is none."""
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")


def watch(tool: str, subject: str, seconds: float, words: Sequence[str] = ()) -> Verdict:
    """Run the kernels of a subject under a tool, in at most so many seconds.

    For those that look at memory it is allocated anew for every tensor, so that what runs over its end is seen. `words` go to
    the program.
    """
    sanitizer = program()
    if sanitizer is None:
        return Verdict(-1, "compute-sanitizer is not there: it comes with CUDA's toolkit")
    own = [sys.executable, "-m", "harness.instruments.sanitized", subject, *words]
    command = [sanitizer, "--tool", tool, *TOOLS[tool], "--error-exitcode", "9", "--print-limit", "20", *own]
    variables = {"PYTHONPATH": os.pathsep.join(filter(None, [str(environment.ROOT), os.environ.get("PYTHONPATH", "")]))}
    variables |= {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if tool in ("memcheck", "initcheck") else {}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True,
        env=os.environ | variables,
    ) as process:  # fmt: skip
        _watched.add(process.pid)
        try:
            output, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # the program too, which is a child of the sanitizer
            return Verdict(-1, f"no end after {seconds:.0f} s")
        finally:
            _watched.discard(process.pid)
    return read(output, process.returncode)


_watched: set[int] = set()  # the sanitizers that run, each the leader of its program's group


def end() -> None:
    """End all that is watched, in whichever thread."""
    for leader in list(_watched):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(leader, signal.SIGKILL)


def read(output: str, code: int) -> Verdict:
    """Return the verdict of an output and an exit code: no errors only if the tool counted none and the program ended well."""
    counts = [int(first or second) for first, second in SUMMARY.findall(output)]
    reports = [line for line in output.splitlines() if line.startswith("=") and "COMPUTE-SANITIZER" not in line]
    shown = "\n".join(line.lstrip("= ") for line in reports[:SHOWN])
    if not counts:
        return Verdict(-1, f"exit code {code} without a count of errors: {output[-400:].strip()}")
    if code and not max(counts):
        return Verdict(-1, f"no errors, but the program ended with {code}: {output[-400:].strip()}")
    ran = sum(not line.startswith("=") for line in output.splitlines())
    return Verdict(max(counts), shown if max(counts) else f"{ran} cases")
