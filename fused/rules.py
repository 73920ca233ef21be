"""What one field of a configuration may be: a predicate, and the same in words for the error."""

from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import Any


@dataclass(frozen=True)
class Rule:
    """What one field may be by itself, as a predicate and in words."""

    holds: Callable[[Any], bool]
    allowed: str

    def check(self, name: str, value: object) -> None:
        """Raise ValueError, with the field's name, the value and what is allowed, unless it holds."""
        if not self.holds(value):
            raise wrong(name, value, self.allowed)

    def optional(self) -> "Rule":
        """The same, or None."""
        return Rule(lambda value: value is None or self.holds(value), f"{self.allowed}, or None")


def wrong(name: str, value: object, allowed: str) -> ValueError:
    """The error for a field; the caller raises it."""
    return ValueError(f"{name} is {value!r}; allowed: {allowed}")


def whole(value: object, least: int) -> bool:
    """Whether it is an integer from `least` up; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def number(value: object, holds: Callable[[Any], bool]) -> bool:
    """Whether it is a real number for which `holds` is true; True and False are none."""
    return isinstance(value, Real) and not isinstance(value, bool) and holds(value)


def one_of(names: tuple[str, ...]) -> Rule:
    """One of these names."""
    return Rule(lambda value: value in names, "one of " + ", ".join(map(repr, names)))


COUNT = Rule(lambda value: whole(value, 1), "a positive integer")
COUNT_OR_0 = Rule(lambda value: whole(value, 0), "an integer from 0 up")
RATE = Rule(lambda value: number(value, lambda rate: 0 <= rate < 1), "a rate from 0 up to, not including, 1")
SHARE = Rule(lambda value: number(value, lambda share: 0 <= share <= 1), "a number from 0 to 1")
POSITIVE = Rule(lambda value: number(value, lambda x: 0 < x < float("inf")), "a positive number")
POSITIVE_OR_0 = Rule(lambda value: number(value, lambda x: 0 <= x < float("inf")), "a number from 0 up")
FLAG = Rule(lambda value: value in (True, False), "True or False")


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
