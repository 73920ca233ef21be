"""Numbers on entry: each message names the function, the argument, what came and what is allowed."""


def check_whole(op: str, name: str, value: object, least: int, most: int | None = None) -> None:
    """Raise TypeError unless `value` is an integer, ValueError unless it is from `least` to `most` (None: any)."""
    allowed = f"an integer from {least} up" if most is None else f"an integer from {least} to {most}"
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{op}: {name} must be {allowed}, got {type(value).__name__}")
    if value < least or (most is not None and value > most):
        raise ValueError(f"{op}: {name} must be {allowed}, got {value}")


def check_real(op: str, name: str, value: object, low: int | float, high: int | float, ends: str = "[]") -> None:
    """Raise TypeError unless `value` is a real number, ValueError unless it lies between `low` and `high`.

    `ends` says whether these two are allowed themselves: "[" and "]" yes, "(" and ")" no. NaN is never.
    """
    allowed = f"a number in {ends[0]}{low:g}, {high:g}{ends[1]}"
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"{op}: {name} must be {allowed}, got {type(value).__name__}")
    inside = low <= value <= high and not (value == low and ends[0] == "(") and not (value == high and ends[1] == ")")
    if not inside:
        raise ValueError(f"{op}: {name} must be {allowed}, got {value}")
