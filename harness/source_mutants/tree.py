"""A copy of the project in a temporary folder, in which bugs are planted and tests run."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from fused.runtime.cache_folder import cache_folder
from harness.source_mutants import fork_server
from harness.source_mutants.catalogue import SourceMutant

LEFT_OUT = ("__pycache__", ".git", ".nox", ".venv", ".*_cache", "*.egg-info")
TOP_LEFT_OUT = ("reports/runs", "build", "dist", "venv")
RECENT = 86400.0  # seconds
# The test of the catalogue fails wherever a bug is planted: its text is not there.
PYTEST = ("-q", "-x", "--tb=short", "-p", "no:cacheprovider", "--ignore=tests/harness/test_catalogue.py")


class Answer(NamedTuple):
    """The end of a run of tests: pytest's exit code, None after the limit; node ids that failed, of files too, of tests that
    passed, and of the test that had not ended, or ""; the end of the output."""

    code: int | None
    failed: tuple[str, ...]
    passed: tuple[str, ...]
    running: str
    output: str

    @property
    def died(self) -> bool:
        """Return whether no test failed, and yet the tests did not end: after the limit, or by a signal."""
        return not self.failed and (self.code is None or self.code < 0)


class Tree:
    """A copy of the packages and tests of a checkout, and a process that runs tests in it. `with` removes both at the end."""

    def __init__(self, root: Path) -> None:
        self._home = Path(tempfile.mkdtemp(prefix="source-mutants-"))
        self.root = self._home / "tree"
        by_name, top = shutil.ignore_patterns(*LEFT_OUT), {root / folder for folder in TOP_LEFT_OUT}

        def left_out(folder: str, names: list[str]) -> set[str]:
            return by_name(folder, names) | {name for name in names if Path(folder, name) in top}

        shutil.copytree(root, self.root, symlinks=True, ignore=left_out)
        self._copy_emulated()
        self._stamp = 0
        self._server: subprocess.Popen[str] | None = None

    def __enter__(self) -> "Tree":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _copy_emulated(self) -> None:
        """Copy the emulated kernels that tests have compiled lately: a file's name tells all that it was made of."""
        to = self._home / "cache" / "videomamba-bench" / "emulated"
        to.mkdir(parents=True)
        for library in cache_folder("emulated").glob("*.so"):
            with contextlib.suppress(FileNotFoundError):  # a test may remove an old one meanwhile
                if library.stat().st_mtime > time.time() - RECENT:
                    shutil.copy2(library, to)

    def close(self) -> None:
        """End the process and remove the copy."""
        if self._server:
            self._server.terminate()  # which ends the tests too
            self._server.wait()
        shutil.rmtree(self._home, ignore_errors=True)

    @contextlib.contextmanager
    def planted(self, mutants: Sequence[SourceMutant]) -> Iterator[None]:
        """Plant bugs for the time within. Raises NotPlanted where one's text is not there, or no longer with the others'.

        Compiled files know their source by its size and its time in seconds: a changed file gets a time that none had before.
        """
        kept: dict[Path, tuple[str, os.stat_result]] = {}
        try:
            for mutant in mutants:
                path = self.root / mutant.file
                text = path.read_text()
                kept.setdefault(path, (text, path.stat()))
                path.write_text(mutant.planted(text))
                self._stamp += 1
                os.utime(path, (self._stamp, self._stamp))
            yield
        finally:
            for path, (text, before) in kept.items():
                path.write_text(text)
                os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))

    def test(self, tests: Sequence[str], seconds: float, stop: bool = True, checked: bool = True) -> Answer:
        """Run tests, to the first failure or all, with caches of their own, in at most so many seconds.

        Unless `checked`, tests/conftest.py does not have the signatures of models checked, which takes most of a short test.
        """
        log = self._home / "log"
        shutil.rmtree(self._home / "pytest", ignore_errors=True)
        kept = [word for word in PYTEST if stop or word != "-x"]
        words = [*kept, f"--basetemp={self._home / 'pytest'}", *tests]
        server = self._started()
        assert server.stdin and server.stdout
        variables = {"UNCHECKED_SIGNATURES": "" if checked else "1"}
        request = {"arguments": words, "seconds": seconds, "log": str(log), "variables": variables}
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        answer = server.stdout.readline()
        if not answer:
            raise RuntimeError(f"the process that runs tests died with exit code {server.wait()}")
        found = json.loads(answer)
        said = log.read_text(errors="replace")[-2000:]
        return Answer(found["code"], tuple(found["failed"]), tuple(found["passed"]), found["running"], said)

    def _started(self) -> "subprocess.Popen[str]":
        """Return the process that runs tests; it ends with this one, when its input does."""
        if self._server is None:
            caches = {"XDG_CACHE_HOME": "cache", "TRITON_CACHE_DIR": "triton", "TORCHINDUCTOR_CACHE_DIR": "inductor"}
            variables = {name: str(self._home / folder) for name, folder in caches.items()}
            path = os.pathsep.join(filter(None, [str(self.root), os.environ.get("PYTHONPATH")]))
            variables |= {"HYPOTHESIS_STORAGE_DIRECTORY": str(self._home), "PYTHONPATH": path}
            variables |= {"PYTHONDONTWRITEBYTECODE": "", "OMP_NUM_THREADS": "1"}  # the unchanged files are compiled once
            self._server = subprocess.Popen(
                [sys.executable, fork_server.__file__, *fork_server.LIBRARIES], cwd=self.root, env=os.environ | variables,
                text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
            )  # fmt: skip
        return self._server
