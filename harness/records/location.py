"""The place where a comparison fails: the wrong tokens, the edge of tiles that they are at, the shortest length that fails."""

from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True)
class WrongTokens:
    """The wrong tokens of one tensor, counted from 0 in time; those between `first` and `last` may be right.

    `edge_forwards` and `edge_backwards` say which edge the first wrong token of either order is at, "" for none.
    """

    tensor: str
    unit: str  # "token", of a model "frame" or "position"
    total: int
    count: int
    first: int
    last: int
    edge_forwards: str = ""
    edge_backwards: str = ""

    def __str__(self) -> str:
        """Return it in words: the first wrong one in each order in which a scan may meet it after right ones."""
        said = f"{self.tensor}: {self.count} of {self.total} {self.unit}s are wrong, {self.first} to {self.last}"
        if self.first > 0:
            said += f"; the first forwards is {self.unit} {self.first}" + f", {self.edge_forwards}" * bool(self.edge_forwards)
        if self.last < self.total - 1:
            said += f"; the first backwards is {self.unit} {self.last}" + f", {self.edge_backwards}" * bool(self.edge_backwards)
        return said


@dataclass(frozen=True)
class Location:
    """The place where a question fails, as far as known; `lengths` says from which length on, or why that is not known."""

    tokens: tuple[WrongTokens, ...] = ()
    shortest: int = 0  # tokens of the shortest prefix that was found to fail; 0 if none was looked for or found
    lengths: str = ""

    def lines(self) -> list[str]:
        """Return a sentence for each tensor, and one for the lengths."""
        return [str(tokens) for tokens in self.tokens] + [self.lengths] * bool(self.lengths)

    @classmethod
    def parse(cls, raw: dict[str, Any]) -> "Location":
        """Return the location of a record's JSON."""
        known = {f.name: raw[f.name] for f in fields(cls) if f.name in raw}
        return cls(**known | {"tokens": tuple(WrongTokens(**tokens) for tokens in raw["tokens"])})
