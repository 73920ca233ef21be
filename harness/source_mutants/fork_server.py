"""A process that has imported libraries, and forks a child for every run of tests.

It is started in a tree, as `python fork_server.py LIBRARY ...`. It reads JSON lines {"arguments": of pytest, "seconds": limit,
"log": file, "variables": of the environment} and answers each with {"code": pytest's exit code or null after the limit,
"failed": node ids of tests and files that failed, "passed": those of tests that passed, "running": that of the test that had
not ended, or ""}. It imports nothing of the tree itself.
"""

import contextlib
import ctypes
import importlib
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

LIBRARIES = ("torch", "numpy", "jaxtyping", "beartype", "hypothesis", "typer.testing", "rich.progress", "pandas",
             "matplotlib.figure", "matplotlib.backends.backend_agg", "yaml", "av", "markdown_it")  # fmt: skip

WORDS = "failed", "passed", "began", "ended"  # of a test's outcome, as pytest has them, and of its ends
PR_SET_CHILD_SUBREAPER = 36  # of Linux's prctl


class Verdicts:
    """A plugin of pytest that writes what began, failed, passed and ended to a file, a JSON line each, as they come."""

    def __init__(self, path: str) -> None:
        self._path = path

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """Note a test that begins."""
        self._note(nodeid, "began")

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Note a test that failed, in its set-up or end too, or passed."""
        if report.failed or report.when == "call":
            self._note(report.nodeid, report.outcome)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        """Note a test that ended."""
        self._note(nodeid, "ended")

    def pytest_collectreport(self, report: Any) -> None:
        """Note a file that could not be imported."""
        if report.failed:
            self._note(report.nodeid, report.outcome)

    def _note(self, test: str, what: str) -> None:
        with open(self._path, "a") as file:
            file.write(json.dumps([test, what]) + "\n")


def run(arguments: list[str], seconds: float, log: str, variables: dict[str, str]) -> dict[str, Any]:
    """Run pytest in a forked child with its output in the file `log`; end it and its own children after so many seconds."""
    verdicts = log + ".verdicts"
    open(verdicts, "w").close()
    child = os.fork()
    if child == 0:
        exit_code = 3
        try:
            os.setsid()
            os.environ.update(variables)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            for stream in (1, 2):
                os.dup2(out, stream)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            exit_code = int(pytest.main(arguments, plugins=[Verdicts(verdicts)]))
        finally:
            os._exit(exit_code)
    code: int | None = None
    end, parent = time.monotonic() + seconds, os.getppid()
    try:
        while code is None and time.monotonic() < end and os.getppid() == parent:
            done, status = os.waitpid(child, os.WNOHANG)
            code = os.waitstatus_to_exitcode(status) if done else None
            time.sleep(0.0 if done else 0.02)
    finally:
        end_children()
    with open(verdicts) as file:
        said = [json.loads(line) for line in file if line.endswith("\n")]  # the last may be cut where the child was killed
    failed, passed, began, ended = ([test for test, what in said if what == word] for word in WORDS)
    running = next((test for test in reversed(began) if test not in ended), "")
    return {"code": code, "failed": failed, "passed": [test for test in passed if test not in failed], "running": running}


def end_children() -> None:
    """Kill all children, and theirs, which this process inherits as their parents end."""
    while children := Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
        for child in map(int, children):
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def main() -> None:
    """Serve until the standard input ends, or SIGTERM comes."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # a test's own processes come here when the test is killed
    for library in sys.argv[1:]:
        with contextlib.suppress(ImportError):
            importlib.import_module(library)
    for line in sys.stdin:
        print(json.dumps(run(**json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
