"""Text from elsewhere in a page, such as names, patterns and errors: Markdown that shows it letter by letter.

`table`, `bold`, `code` and `fence` take text as it is and escape it. What is Markdown already is marked as `Markdown`.
"""

import re
from collections.abc import Iterable, Sequence

import pandas as pd

# What Markdown or GitHub's dialect of it would take for something: emphasis, code, HTML, entities, links, strikethrough,
# mathematics, escapes. An underscore within a word is none.
_SIGNS = re.compile(r"[\\`*~$]|(?<![^\W_])_|_(?![^\W_])|\](?=[(\[:])|&(?=#?\w+;)")


class Markdown(str):
    """Text that is Markdown already."""

    __slots__ = ()


def escape(text: object, most: int | None = None) -> Markdown:
    """Return text as Markdown on one line, at most `most` characters of it; Markdown stays as it is."""
    if isinstance(text, Markdown):
        return text
    line = " ".join(str(text).split())[:most]
    return Markdown(_SIGNS.sub(lambda sign: "&amp;" if sign[0] == "&" else "\\" + sign[0], line).replace("<", "&lt;"))


def bold(text: object, most: int | None = None) -> Markdown:
    """Return text in bold."""
    return Markdown(f"**{escape(text, most)}**")


def code(text: object) -> Markdown:
    """Return text on one line as code within a line."""
    line = " ".join(str(text).split())
    ticks = _longer_than_any(line, 1)
    pad = " " * (line.startswith("`") or line.endswith("`"))
    return Markdown(f"{ticks}{pad}{line}{pad}{ticks}")


def fence(text: str, indent: str = "") -> Markdown:
    """Return text as a block of code, every line of it behind `indent`."""
    ticks = _longer_than_any(text, 3)
    return Markdown("\n".join(indent + line for line in (ticks, *text.splitlines(), ticks)))


def join(parts: Iterable[object], separator: str = ", ") -> Markdown:
    """Return parts, each of them escaped, with a separator of Markdown between them."""
    return Markdown(separator.join(escape(part) for part in parts))


def table(head: Sequence[object], rows: Iterable[Sequence[object]]) -> Markdown:
    """Return a table; a bar in a cell does not end it."""
    lines = [head, ["---"] * len(head), *rows]
    return Markdown("\n".join("| " + " | ".join(escape(cell).replace("|", "\\|") for cell in line) + " |" for line in lines))


def sparse(head: Sequence[object], rows: Sequence[Sequence[object]]) -> Markdown:
    """Return a table without the columns whose cells are all empty or "-"."""
    told = [i for i in range(len(head)) if any(str(row[i]) not in ("", "-") for row in rows)]
    return table([head[i] for i in told], [[row[i] for i in told] for row in rows])


def frame(numbers: pd.DataFrame) -> Markdown:
    """Return a data frame as a table; its index is the first column."""
    rows = numbers.reset_index()
    return table(list(rows.columns), rows.itertuples(index=False))


def _longer_than_any(text: str, least: int) -> str:
    """Return so many backticks as the text has nowhere in a row, `least` of them or more."""
    return "`" * max(least, *(len(run) + 1 for run in re.findall("`+", text)), least)
