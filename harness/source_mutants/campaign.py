"""The verdicts on planted bugs: narrow tests for each, then all survivors of a room together, bisected."""

import contextlib
import queue
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from harness.records.finding import Finding
from harness.records.record import Record
from harness.source_mutants.catalogue import NotPlanted, SourceMutant
from harness.source_mutants.tree import Answer, Tree

CHECK = "mutants"  # the check that the records name
NARROW, WIDE = 180.0, 1800.0  # seconds that the narrow tests of one bug, and those of a room, may take
NARROW_ON_GPU = 60.0  # blocks that wait for each other forever use a GPU that others need
TOGETHER = 8  # bugs between two looks at whether the tests that found them pass without
RAN = (0, 1, 2)  # pytest's exit codes where tests ran: all passed, one failed, a file could not be imported


class Campaign:
    """Trees of a checkout at `root` and the verdicts in them; `tell` gets every record.

    `wide` are the tests of each room; of a room without, what survives the narrow tests has survived. With a `gpu` bugs that
    need one are planted too.
    """

    def __init__(
        self, root: Path, jobs: int, tell: Callable[[Record], None], wide: Mapping[str, tuple[str, ...]], gpu: bool = False
    ) -> None:
        self._root, self._tell, self._wide = root, tell, wide
        self._jobs, self._gpu = jobs, gpu
        self._seconds = NARROW_ON_GPU if gpu else NARROW
        self._sound: dict[tuple[str, bool], bool] = {}  # whether a test, or a bug's tests, passes without a bug; by `checked`
        self._trees: queue.SimpleQueue[Tree] = queue.SimpleQueue()
        self._made: list[Tree] = []

    def run(self, mutants: Iterable[SourceMutant]) -> None:
        """Give a verdict on each bug."""
        asked = []
        for mutant in mutants:
            if mutant.equivalent or (mutant.needs_gpu and not self._gpu):
                reason = f"equivalent: {mutant.equivalent}" if mutant.equivalent else f"needs a GPU: {mutant.needs_gpu}"
                self._tell(self._record(mutant, "skip", reason=reason))
            else:
                asked.append(mutant)
        batches = [asked[i : i + TOGETHER] for i in range(0, len(asked), TOGETHER)]
        self._made = [Tree(self._root) for _ in range(max(1, min(self._jobs, len(batches))))]
        for tree in self._made:
            self._trees.put(tree)
        pool = ThreadPoolExecutor(len(self._made))
        try:
            survivors = [m for found in pool.map(self._narrow, batches) for m in found]
            for mutant in survivors:
                if mutant.room not in self._wide:
                    self._tell(self._survived(mutant))
            rooms = [[m for m in survivors if m.room == room] for room in self._wide]
            list(pool.map(self._wide_of, filter(None, rooms)))
        finally:
            for tree in self._made:
                tree.close()  # ends what a thread waits for
            pool.shutdown(cancel_futures=True)

    def _narrow(self, batch: Sequence[SourceMutant]) -> list[SourceMutant]:
        """Ask the narrow tests of each; return those that survive.

        What is not found without checks of signatures is asked with them.
        """
        tree, left = self._trees.get(), list(batch)
        for checked in (False, True):
            asked, left = left, []
            caught = []
            for mutant in asked:
                start = time.monotonic()
                with tree.planted([mutant]):
                    answer = tree.test(mutant.ordered_tests(), self._seconds, checked=checked)
                if answer.code == 0:
                    left.append(mutant)
                else:
                    caught.append((mutant, answer, time.monotonic() - start))
            self._check(tree, [answer for _, answer, _ in caught], checked)
            for mutant, answer, _ in caught:
                if answer.died:  # tests that take as long, or crash, without the bug have found nothing
                    tests = [answer.running] if answer.running else mutant.tests
                    self._sound[mutant.name, checked] = tree.test(tests, self._seconds, checked=checked).code == 0
            for mutant, answer, seconds in caught:
                record = self._caught(mutant, answer, seconds, checked)
                if record.status == "pass" or checked:
                    self._tell(record)
                else:
                    left.append(mutant)
        self._trees.put(tree)
        return left

    def _wide_of(self, survivors: Sequence[SourceMutant]) -> None:
        """Ask all tests of a room of its survivors together; where one fails, of either half of them."""
        tree, start = self._trees.get(), time.monotonic()
        answer = None
        with contextlib.suppress(NotPlanted), tree.planted(survivors):  # two at one place are not planted together
            answer = tree.test(self._wide[survivors[0].room], WIDE)
        self._check(tree, [answer] if answer else [], True)
        self._trees.put(tree)
        if answer and answer.code == 0:
            for mutant in survivors:
                self._tell(self._survived(mutant))
        elif answer and len(survivors) == 1:
            self._tell(self._caught(survivors[0], answer, time.monotonic() - start, True))
        else:
            for half in (survivors[: len(survivors) // 2], survivors[len(survivors) // 2 :]):
                self._wide_of(half)

    def _check(self, tree: Tree, answers: Iterable[Answer], checked: bool) -> None:
        """Find out whether the tests that failed pass in the tree without a bug; what does not run has not passed.

        They run file by file: one that cannot be imported keeps all others of its run from running.
        """
        new = [test for test in dict.fromkeys(t for a in answers for t in a.failed) if (test, checked) not in self._sound]
        for file in dict.fromkeys(test.partition("::")[0] for test in new):
            own = [test for test in new if test.partition("::")[0] == file]
            passed = tree.test(own, WIDE, stop=False, checked=checked).passed
            self._sound |= {(test, checked): any(p == test or p.startswith(test + "::") for p in passed) for test in own}

    def _caught(self, mutant: SourceMutant, answer: Answer, seconds: float, checked: bool) -> Record:
        """Return the record of a bug on which the tests did not pass."""
        if answer.died:
            how = f"did not end within {self._seconds:.0f} s" if answer.code is None else f"died by signal {-answer.code}"
            how = f"{answer.running or 'the tests'} {how}"
            if self._sound.get((mutant.name, checked)):
                return self._record(mutant, "pass", 0.0, how, seconds=seconds)
            return self._record(mutant, "error", reason=f"{how}, or does not pass without the bug: {mutant.tests}")
        if answer.code not in RAN or not answer.failed:
            return self._record(mutant, "error", reason=f"pytest exits with {answer.code}: {answer.output[-400:]}")
        if unsound := [test for test in answer.failed if not self._sound[test, checked]]:
            return self._record(mutant, "error", reason=f"it fails without the bug too: {', '.join(unsound)}")
        return self._record(mutant, "pass", 0.0, answer.failed[0], seconds=seconds)

    def _survived(self, mutant: SourceMutant) -> Record:
        """Return the record of a bug that no test found."""
        if mutant.survives:
            return self._record(mutant, "skip", reason=f"known to survive: {mutant.survives}")
        note = f"{mutant.file}:{mutant.line(self._root)}: {mutant.before!r} became {mutant.after!r}"
        return self._record(mutant, "fail", 1.0, note)

    def _record(
        self, mutant: SourceMutant, status: str, survived: float = 0.0, note: str = "", reason: str = "", seconds: float = 0.0
    ) -> Record:
        """Return the record of a verdict; a finding says that it survived, or which test failed."""
        findings = (Finding("bug", "survived", survived, 0.0, note=note),) if note else ()
        command = f'python -m harness mutants --case "{mutant.name}"'
        return Record(
            mutant.room, "tests", "ours", CHECK, mutant.name, "", status, round(seconds, 2), reason, findings, command
        )
