"""The files that are subjects and planted bugs, by name: the file system is the registry."""

import functools
import importlib
import pkgutil
from types import ModuleType
from typing import cast

from harness.judge.protocols import Subject


def subjects() -> dict[str, Subject]:
    """Return the subjects by name: the modules of `harness/subjects/`. Raises TypeError for one that lacks a member."""
    found = modules_of("harness.subjects")
    for name, module in found.items():
        if missing := [m for m in vars(Subject) if not m.startswith("_") and not hasattr(module, m)]:
            raise TypeError(f"subject {name!r} lacks {', '.join(missing)}: see harness/judge/protocols.py")
    return cast(dict[str, Subject], found)


def mutants() -> dict[str, ModuleType]:
    """Return the planted bugs by name: the modules of `harness/mutants/`."""
    return modules_of("harness.mutants")


def title(module: object) -> str:
    """Return the first sentence of a module's docstring."""
    return " ".join((module.__doc__ or "").split("\n\n")[0].split())


def modules_of(package: str) -> dict[str, ModuleType]:
    """Return the modules and packages in a package by name, sorted."""
    names = _names(tuple(importlib.import_module(package).__path__))
    return {name: importlib.import_module(f"{package}.{name}") for name in names}


@functools.cache
def _names(path: tuple[str, ...]) -> list[str]:
    return sorted(m.name for m in pkgutil.iter_modules(path))
