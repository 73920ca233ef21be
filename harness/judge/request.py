"""The request of a parity run: grid, filters, added implementations. Picklable, so that another process asks the same."""

import contextlib
import difflib
import functools
import importlib
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from fused.io.video import VideoError, count_frames
from harness.judge.case import DTYPES, Case
from harness.judge.check import Check, checks
from harness.judge.implementation import Implementation
from harness.judge.protocols import HasLayouts, HasSpecialCases
from harness.judge.registry import mutants, subjects

GRIDS = ("smoke", "full", "long")
NAME = re.compile(r"[^\W_][\w.:+-]*")  # of an added implementation: no sign of a shell pattern


class UsageError(ValueError):
    """Options that cannot be used as they were given; the message says what is allowed."""


def default_device() -> str:
    """Return the first GPU if there is one, else the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def require_device(device: str) -> str:
    """Return the device if PyTorch sees it. Raises UsageError."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    seen = ", ".join(["cpu", *(f"cuda:{i}" for i in range(count))])
    try:
        requested = torch.device(device)
    except RuntimeError as error:
        raise UsageError(f"{device!r} is no device; there are {seen}") from error
    if requested.type == "cuda" and (requested.index or 0) >= count:
        raise UsageError(f"PyTorch sees no device {device!r} here; there are {seen}")
    return device


def require_known(what: str, given: Iterable[str], allowed: Iterable[str], patterns: bool = False) -> None:
    """Raise UsageError for a given name that is not allowed; with `patterns`, for a shell pattern that fits no name."""
    allowed = list(dict.fromkeys(allowed))
    for name in given:
        if not (any(fnmatchcase(a, name) for a in allowed) if patterns else name in allowed):
            raise UsageError(unknown(what, name, allowed))


def unknown(what: str, name: str, allowed: Iterable[str]) -> str:
    """Return a sentence on a name that is none of the allowed, with the nearest of them if it looks like a slip."""
    nearest = "".join(f"; did you mean {near!r}?" for near in difflib.get_close_matches(name, list(allowed), n=1))
    return f"{what} {name!r} is unknown; allowed are {', '.join(allowed)}{nearest}"


@dataclass(frozen=True)
class ParityRequest:
    """The request of a parity run. Empty filters take all. `added` are `SUBJECT:NAME=module:callable[@layout]`, `rivals` names
    that do not decide the exit code, `mutant` a bug to plant in `fused`."""

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
                 "check": (tuple(checks()), self.checks), "dtype": (tuple(DTYPES), self.dtypes),
                 "mutant": (tuple(mutants()), (self.mutant,) if self.mutant else ())}  # fmt: skip
        for option, (allowed, given) in known.items():
            require_known(option, given, allowed)
        added = [":".join(parse_added(text)[:2]) for text in self.added]
        if twice := [name for i, name in enumerate(added) if name in added[:i]]:
            raise UsageError(f"--with adds {twice[0]} twice; give one of them another name")
        everyone = [name for subject in subjects() for name in self.implementations(subject)]
        require_known("implementation", (*self.names, *self.rivals), everyone, patterns=True)
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
        """Return whether less than everything is asked, or something else than the product."""
        return any((self.subjects, self.checks, self.names, self.dtypes, self.cases, self.mutant)) or self.grid == "smoke"

    def implementations(self, subject: str) -> dict[str, Implementation]:
        """Return the implementations of a subject by name, the added ones last."""
        found = {i.name: i for i in subjects()[subject].implementations()}
        for text in self.added:
            whose, name, call = parse_added(text)
            if whose == subject:
                found[name] = Implementation(name, call)
        return {k: replace(i, rival=i.rival or any(fnmatchcase(k, r) for r in self.rivals)) for k, i in found.items()}

    def selected_cases(self) -> list[Case]:
        """Return the cases of the grid that the filters leave."""
        found: list[Case] = []
        for name, subject in subjects().items():
            if not self.subjects or name in self.subjects:
                found += subject.cases(self.grid)
                if isinstance(subject, HasSpecialCases):
                    found += (c for check in self._selected_checks() for c in subject.special_cases(check, self.grid))
        found = [replace(case, video=self.video) if case.has("video") else case for case in found]
        return [c for c in found if (not self.dtypes or c.dtype in self.dtypes) and c.matches(list(self.cases))]

    def _selected_checks(self) -> dict[str, Check]:
        return {name: check for name, check in checks().items() if not self.checks or name in self.checks}

    def questions(self, case: Case) -> list[tuple[str, Check, Implementation]]:
        """Return (check's name, check, implementation) asked in a case; the implementations may or may not run here."""
        subject, selected = subjects()[case.subject], self._selected_checks()
        return [
            (name, check, implementation)
            for implementation in self.implementations(case.subject).values()
            if not self.names or any(fnmatchcase(implementation.name, p) for p in self.names)
            for name, check in selected.items()
            if case.only_check in ("", name) and check.asks(subject, implementation, case)
        ]

    def command(self, case: Case, implementation: str, check: str) -> str:
        """Return the command that asks one question again."""
        words = ["python -m harness parity", f"--grid {self.grid}", f"--subject {case.subject}", f"--check {check}",
                 f"--impl {implementation}", f"--case {case.name}", f"--device {self.device}"]  # fmt: skip
        words += [f"--video '{self.video}'"] if self.video else []
        words += [f"--with '{text}'" for text in self.added] + [f"--rival '{name}'" for name in self.rivals]
        words += [f"--mutant {self.mutant}"] if self.mutant else []
        return " ".join(words)

    @contextlib.contextmanager
    def planted(self) -> Iterator[None]:
        """Plant the request's bug in `fused`, if it has one, for the time within."""
        with mutants()[self.mutant].plant() if self.mutant else contextlib.nullcontext():
            yield

    def set_threads(self) -> None:
        """Make PyTorch use as many threads as the request says: sums depend on their number."""
        torch.set_num_threads(self.threads)


def parse_added(text: str) -> tuple[str, str, Callable[..., Any]]:
    """Return (subject, name, callable in this project's signature) of `SUBJECT:NAME=module:callable[@LAYOUT]`.

    Raises UsageError, which says which part of it is wrong and what is allowed there.
    """
    target, _, path = text.partition("=")
    subject, _, name = target.partition(":")
    path, at, layout = path.partition("@")
    module, _, attribute = path.partition(":")

    def refuse(why: str) -> UsageError:
        return UsageError(f"--with {text!r}: {why}")

    if not (subject and name and module and attribute):
        raise refuse("it is not SUBJECT:NAME=module:callable or SUBJECT:NAME=module:callable@LAYOUT")
    known = subjects()
    if subject not in known:
        raise refuse(unknown("subject", subject, known))
    if not NAME.fullmatch(name):
        raise refuse(f"the name {name!r} is not a letter or digit, then letters, digits and _ . : + -")
    if any(name == i.name for i in known[subject].implementations()):
        raise refuse(f"{subject} has an implementation {name!r} already; give yours another name")
    adapt = _layout(subject, layout, refuse) if at else None
    call = _imported(module, attribute, refuse)
    return subject, name, adapt(call) if adapt else call


Refuse = Callable[[str], UsageError]  # of the reason


def _layout(subject: str, layout: str, refuse: Refuse) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return the adapter from a layout that the subject offers."""
    offered = {name: s.LAYOUTS for name, s in subjects().items() if isinstance(s, HasLayouts)}
    if subject not in offered:
        others = "; ".join(f"{name} has {', '.join(layouts)}" for name, layouts in offered.items())
        raise refuse(f"{subject} has this project's layout only, so that @{layout} has to go ({others})")
    if layout not in offered[subject]:
        allowed = f"allowed are {', '.join(offered[subject])}, or no @ for this project's own"
        raise refuse(f"{subject} has no layout {layout!r}; {allowed}")
    return offered[subject][layout]


def _imported(module: str, attribute: str, refuse: Refuse) -> Callable[..., Any]:
    """Return a callable of a module; `attribute` may have dots."""
    try:
        found = functools.reduce(getattr, attribute.split("."), importlib.import_module(module))
    except (ImportError, AttributeError) as error:
        raise refuse(str(error)) from error
    except (Exception, SystemExit) as error:  # the module is the user's, and may raise anything
        raise refuse(f"importing {module!r} raises {type(error).__name__}: {error}") from error
    if not callable(found):
        raise refuse(f"{module}:{attribute} is no callable but of type {type(found).__name__}")
    return found
