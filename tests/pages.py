"""The fenced blocks of the pages."""

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
NOT_RUN = re.compile(r"<!-- not run: \S.* -->$")
EXTRA = re.compile(r"<!-- extra: (\w+) -->$")  # run by `nox -s extras`, where this extra is installed


class Block(NamedTuple):
    """A fenced block of a page: its language, the line of its first line, its text, and the marks above it."""

    language: str
    line: int
    text: str
    not_run: bool
    extra: str | None


def blocks_of(page: str) -> list[Block]:
    """Return the fenced blocks of a page, in order."""
    blocks, lines, start = [], (ROOT / page).read_text().splitlines(), None
    for i, line in enumerate(lines):
        if not line.startswith("```"):
            continue
        if start is None:
            start = i
            continue
        above = lines[start - 1] if start else ""
        extra = EXTRA.match(above)
        text = "\n".join(lines[start + 1 : i])
        blocks.append(Block(lines[start][3:].strip(), start + 2, text, bool(NOT_RUN.match(above)), extra and extra[1]))
        start = None
    assert start is None, f"{page}:{start}: the block is not closed"
    return blocks
