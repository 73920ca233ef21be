"""The planted bugs as data: a JSON line each, in a file for each room of the project."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
KINDS = {
    "rule": "a number or a term of a formula", "boundary": "an edge, an index or a size", "unit": "a unit or a ratio",
    "state": "what is kept, forgotten or shared between calls", "order": "an order in time, of a list or of classes",
    "dtype": "a precision or a rounding", "layout": "memory: strides, views, storage", "gradient": "what a backward gives",
    "choice": "which of several things is taken", "forwarding": "an option that does not reach its place",
    "error": "an exception, an exit code or a refusal", "page": "what is shown", "file": "what is read or written",
}  # fmt: skip
ROOMS = {  # what runs beside the narrow tests, for all survivors of a room together
    "judge": ("tests/harness",), "bench": ("tests/harness",), "pages": ("tests/harness",),
    "training": ("tests/fused/train",), "io": ("tests/fused/io", "tests/fused/train/test_data.py"),
    "cpu": ("tests/fused/ops", "tests/fused/runtime"),
    "kernels": ("tests/fused/ops",), "operators": ("tests/fused/ops",), "runtime": ("tests/fused/runtime",),
    "commands": ("tests/fused/evaluate", "tests/fused/chat", "tests/fused/features"),
    "models": ("tests/fused/models", "tests/fused/chunked", "tests/test_streaming.py", "tests/test_golden.py"),
}  # fmt: skip


class NotPlanted(ValueError):
    """A bug that cannot be planted: its text is not in its file, or there more than once."""


@dataclass(frozen=True)
class SourceMutant:
    """A bug: in `file` the text `before`, which occurs once, is `after`.

    `tests` are the narrow tests, as pytest's arguments. `killer` is the test that is expected to fail, noted by a run; what
    no run has found yet has none. `equivalent` argues why nothing can show the bug, `survives` says which test is missing,
    `needs_gpu` why a CPU cannot show it; all three are empty for a bug that the tests must find.
    """

    room: str
    file: str
    bug: str
    kind: str
    before: str
    after: str
    tests: tuple[str, ...] = ()
    killer: str = ""
    equivalent: str = ""
    survives: str = ""
    needs_gpu: str = ""

    @property
    def name(self) -> str:
        """Return the name, unique in the catalogue."""
        return f"{self.file}: {self.bug}"

    def ordered_tests(self) -> list[str]:
        """Return the narrow tests, the killer first: with the parameters that `tests` name, else with all that it has."""
        if not self.killer:
            return list(self.tests)
        own = [test for test in self.tests if test.partition("[")[0] == self.killer]
        return [*(own or [self.killer]), *(test for test in self.tests if test not in own)]

    def line(self, root: Path) -> int:
        """Return the line of the file where the bug is, from 1 on. Raises NotPlanted as `planted` does."""
        text = (root / self.file).read_text()
        self.planted(text)
        return text[: text.index(self.before)].count("\n") + 1

    def planted(self, text: str) -> str:
        """Return the text of the file with the bug. Raises NotPlanted unless `before` occurs exactly once."""
        if text.count(self.before) != 1:
            raise NotPlanted(f"{self.name}: {self.before!r} occurs {text.count(self.before)} times, not once")
        return text.replace(self.before, self.after)


def read(folder: Path = HERE) -> list[SourceMutant]:
    """Return all bugs, by room and in the order of the files. Raises ValueError that names file and line of a wrong entry."""
    return [mutant for path in sorted(folder.glob("*.jsonl")) for mutant in read_file(path)]


def read_file(path: Path) -> list[SourceMutant]:
    """Return the bugs of one room, in order. Raises ValueError as `read` does."""
    found = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            raw = json.loads(line)
            found.append(SourceMutant(path.stem, **raw | {"tests": tuple(raw.get("tests", ()))}))
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"{path}, line {number} is no planted bug: {error}") from error
    return found


def note_killers(killers: Mapping[str, str], folder: Path = HERE) -> None:
    """Write into the data which test found each bug, by the bugs' names.

    `killers` begin with a node id; its parameters, and what follows, are left out.
    """
    for path in sorted(folder.glob("*.jsonl")):
        lines = []
        for mutant, line in zip(read_file(path), path.read_text().splitlines(), strict=True):
            killer = killers.get(mutant.name, "").partition("[")[0].partition(" ")[0]
            lines.append(json.dumps(json.loads(line) | {"killer": killer}, ensure_ascii=False) if "::" in killer else line)
        path.write_text("\n".join(lines) + "\n")
