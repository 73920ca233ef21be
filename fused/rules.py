"""Rules for the fields of a configuration and for arguments: a predicate, and the allowed values in words."""

import difflib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from numbers import Real
from typing import Any


@dataclass(frozen=True)
class Rule:
    """The rule for one field by itself: a predicate, and the allowed values in words."""

    holds: Callable[[Any], bool]
    allowed: str

    def check(self, name: str, value: object) -> None:
        """Raise ValueError, with the field's name, the value and what is allowed, unless the predicate holds for `value`."""
        if not self.holds(value):
            raise invalid(name, value, self.allowed)

    def optional(self) -> "Rule":
        """Return the rule that also allows None."""
        return Rule(lambda value: value is None or self.holds(value), f"{self.allowed}, or None")


def invalid(name: str, value: object, allowed: str) -> ValueError:
    """Return the error for a field's invalid value; the caller raises it."""
    return ValueError(f"{name} is {value!r}; allowed: {allowed}")


def abbreviate(names: Sequence[object], most: int = 5) -> str:
    """Return the first names, and the number of the others, as one line."""
    few = ", ".join(map(str, names[:most]))
    return few if len(names) <= most else f"{few} and {len(names) - most} more"


def is_integer(value: object, least: int) -> bool:
    """Return whether `value` is an integer from `least` up; True and False are not."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def is_number(value: object, holds: Callable[[Any], bool]) -> bool:
    """Return whether `value` is a real number for which `holds` is true; True and False are not."""
    return isinstance(value, Real) and not isinstance(value, bool) and holds(value)


def one_of(names: tuple[str, ...]) -> Rule:
    """Return the rule that allows these names."""
    return Rule(lambda value: value in names, "one of " + ", ".join(map(repr, names)))


COUNT = Rule(lambda value: is_integer(value, 1), "a positive integer")
COUNT_OR_0 = Rule(lambda value: is_integer(value, 0), "an integer from 0 up")
RATE = Rule(lambda value: is_number(value, lambda rate: 0 <= rate < 1), "a rate from 0 up to, not including, 1")
FRACTION = Rule(lambda value: is_number(value, lambda share: 0 <= share <= 1), "a number from 0 to 1")
POSITIVE = Rule(lambda value: is_number(value, lambda x: 0 < x < float("inf")), "a positive number")
POSITIVE_OR_0 = Rule(lambda value: is_number(value, lambda x: 0 <= x < float("inf")), "a number from 0 up")
FLAG = Rule(lambda value: isinstance(value, bool | int | float) and value in (True, False), "True or False")


def check_field_names(cls: type[Any], given: Iterable[str]) -> None:
    """Raise TypeError, with the nearest field's name, unless all names are fields of a dataclass."""
    names = [f.name for f in fields(cls)]
    if unknown := [name for name in given if name not in names]:
        near = difflib.get_close_matches(unknown[0], names, n=1)
        hint = f"the nearest is {near[0]}" if near else "the fields are " + ", ".join(names)
        raise TypeError(f"{unknown[0]} is no field of {cls.__name__}; {hint}")


def check_integer(op: str, name: str, value: object, least: int, most: int | None = None) -> None:
    """Raise TypeError unless argument `name` of `op` is an integer, ValueError unless it is in [least, most] (None: no end)."""
    allowed = f"an integer from {least} up" if most is None else f"an integer from {least} to {most}"
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{op}: {name} must be {allowed}, got {type(value).__name__}")
    if value < least or (most is not None and value > most):
        raise ValueError(f"{op}: {name} must be {allowed}, got {value}")


def check_number(op: str, name: str, value: object, low: int | float, high: int | float, ends: str = "[]") -> None:
    """Raise TypeError unless argument `name` of `op` is a real number, ValueError unless it lies between `low` and `high`.

    `ends` says whether the two limits are allowed: "[" and "]" include them, "(" and ")" exclude them. NaN is never allowed.
    """
    allowed = f"a number in {ends[0]}{low:g}, {high:g}{ends[1]}"
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"{op}: {name} must be {allowed}, got {type(value).__name__}")
    inside = low <= value <= high and not (value == low and ends[0] == "(") and not (value == high and ends[1] == ")")
    if not inside:
        raise ValueError(f"{op}: {name} must be {allowed}, got {value}")
