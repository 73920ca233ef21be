"""What a parity run asks: grid, filters, added implementations. Picklable, so that another process builds the same things."""

import contextlib
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from fused.io.video import VideoError, count_frames
from harness.judge import layout_adapters as adapters
from harness.judge.case import Case
from harness.judge.registry import Implementation, checks, mutants, subjects

GRIDS = ("smoke", "full", "long")


class UsageError(ValueError):
    """A wish that cannot be met as it was put; the message says what is allowed."""


def default_device() -> str:
    """The first GPU if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def existing(device: str) -> str:
    """The device, if it is here. Raises UsageError."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    there = ", ".join(["cpu", *(f"cuda:{i}" for i in range(count))])
    try:
        asked = torch.device(device)
    except RuntimeError as error:
        raise UsageError(f"{device!r} is no device; there are {there}") from error
    if asked.type == "cuda" and (asked.index or 0) >= count:
        raise UsageError(f"PyTorch sees no device {device!r} here; there are {there}")
    return device


@dataclass(frozen=True)
class Plan:
    """Empty filters take all. `added` are `SUBJECT:NAME=module:callable[@layout]`, `rivals` names that do not decide the exit
    code, `mutant` a bug to plant in `fused`."""

    grid: str
    device: str
    subjects: tuple[str, ...] = ()
    checks: tuple[str, ...] = ()
    names: tuple[str, ...] = ()  # shell patterns of implementations
    dtypes: tuple[str, ...] = ()
    cases: tuple[str, ...] = ()  # shell patterns of case names
    video: str = ""
    added: tuple[str, ...] = ()
    rivals: tuple[str, ...] = ()
    mutant: str = ""
    threads: int = 1

    def __post_init__(self) -> None:
        known = {"grid": (GRIDS, (self.grid,)), "subject": (tuple(subjects()), self.subjects),
                 "check": (tuple(checks()), self.checks), "dtype": (("float32", "bfloat16", "float16", "float64"), self.dtypes),
                 "mutant": (tuple(mutants()), (self.mutant,) if self.mutant else ())}  # fmt: skip
        for what, (allowed, wanted) in known.items():
            for name in wanted:
                if name not in allowed:
                    raise UsageError(f"{what} {name!r} is unknown; allowed are {', '.join(allowed)}")
        everyone = [name for subject in subjects() for name in self.implementations(subject)]
        for pattern in (*self.names, *self.rivals):
            if not any(fnmatchcase(name, pattern) for name in everyone):
                raise UsageError(f"implementation {pattern!r} is unknown; there are {', '.join(dict.fromkeys(everyone))}")
        if self.video and not Path(self.video).is_file():
            raise UsageError(f"video {self.video!r} is not a file")
        if self.video:
            try:
                count_frames(Path(self.video))
            except VideoError as error:
                raise UsageError(f"--video: {error}") from error
            except ImportError:
                pass  # cases that need it are skipped, and say so

    @property
    def filtered(self) -> bool:
        """Whether less than everything is asked, or something else than the product."""
        return any((self.subjects, self.checks, self.names, self.dtypes, self.cases, self.mutant)) or self.grid == "smoke"

    def implementations(self, subject: str) -> dict[str, Implementation]:
        """Implementations of a subject by name, the added ones last."""
        found = {i.name: i for i in subjects()[subject].implementations()}
        for text in self.added:
            whose, name, call = parse_added(text)
            if whose == subject:
                found[name] = Implementation(name, call)
        return {k: replace(i, rival=i.rival or any(fnmatchcase(k, r) for r in self.rivals)) for k, i in found.items()}

    def points(self) -> list[Case]:
        """Cases of the grid that the filters leave."""
        chosen = [name for name in subjects() if not self.subjects or name in self.subjects]
        wanted = [check for name, check in checks().items() if not self.checks or name in self.checks]
        own = [case for check in wanted if hasattr(check, "cases") for case in check.cases(self.grid)]
        cases = [c for name in chosen for c in (*subjects()[name].cases(self.grid), *(c for c in own if c.subject == name))]
        cases = [replace(case, video=self.video) if case.has("video") else case for case in cases]
        return [c for c in cases if (not self.dtypes or c.dtype in self.dtypes) and c.matches(list(self.cases))]

    def questions(self, case: Case) -> list[tuple[str, ModuleType, Implementation]]:
        """(check's name, check, implementation) asked in a case, for implementations that may or may not run here."""
        subject = subjects()[case.subject]
        return [
            (name, check, implementation)
            for implementation in self.implementations(case.subject).values()
            if not self.names or any(fnmatchcase(implementation.name, p) for p in self.names)
            for name, check in checks().items()
            if (not self.checks or name in self.checks) and case.asker in ("", name)
            if check.asks(subject, implementation, case)
        ]

    def command(self, case: Case, implementation: str, check: str) -> str:
        """The command that asks one question again."""
        words = ["python -m harness parity", f"--grid {self.grid}", f"--subject {case.subject}", f"--check {check}",
                 f"--impl {implementation}", f"--case {case.name}", f"--device {self.device}"]  # fmt: skip
        words += [f"--video '{self.video}'"] if self.video else []
        words += [f"--with '{text}'" for text in self.added] + [f"--rival '{name}'" for name in self.rivals]
        words += [f"--mutant {self.mutant}"] if self.mutant else []
        return " ".join(words)

    @contextlib.contextmanager
    def planted(self) -> Iterator[None]:
        """With the plan's bug in `fused`, if it has one."""
        with mutants()[self.mutant].plant() if self.mutant else contextlib.nullcontext():
            yield

    def threads_here(self) -> None:
        """Use as many threads as the plan says: sums depend on their number."""
        torch.set_num_threads(self.threads)


def parse_added(text: str) -> tuple[str, str, Callable[..., Any]]:
    """`SUBJECT:NAME=module:callable[@layout]` to (subject, name, callable in the design's signature)."""
    target, _, path = text.partition("=")
    subject, _, name = target.partition(":")
    path, _, layout = path.partition("@")
    module, _, attribute = path.partition(":")
    if not (subject in subjects() and name and module and attribute):
        raise UsageError(
            f"--with {text!r} is not SUBJECT:NAME=module:callable, with SUBJECT one of {', '.join(subjects())}; "
            f"append @LAYOUT for another layout ({', '.join(adapters.LAYOUTS)})"
        )
    try:
        call = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UsageError(f"--with {text!r}: {error}") from error
    if layout and (layout not in adapters.LAYOUTS or subject not in adapters.LAYOUTS[layout]):
        raise UsageError(f"--with {text!r}: no layout {layout!r} for {subject}; there are {', '.join(adapters.LAYOUTS)}")
    return subject, name, adapters.LAYOUTS[layout][subject](call) if layout else call
