"""The result of one question: one JSON line. Combinations that mean nothing cannot be built."""

import json
import math
from dataclasses import asdict, dataclass, fields
from typing import Any

from harness.records.finding import Finding
from harness.records.location import Location

STATUSES = ("pass", "fail", "error", "skip", "oom", "timeout")
FAILED = ("fail", "error", "oom", "timeout")


@dataclass(frozen=True)
class Record:
    """`role` is "ours" or "rival"; `case` is empty where an implementation could not run here at all (a skip)."""

    subject: str
    implementation: str
    role: str
    check: str
    case: str
    dtype: str
    status: str
    seconds: float = 0.0
    reason: str = ""
    findings: tuple[Finding, ...] = ()
    command: str = ""  # reruns this one case
    location: Location | None = None  # of a failure

    def __post_init__(self) -> None:
        if self.status not in STATUSES:
            raise ValueError(f"status is {self.status!r}; allowed are {', '.join(STATUSES)}")
        if self.role not in ("ours", "rival"):
            raise ValueError(f"role is {self.role!r}; allowed are 'ours' and 'rival'")
        if self.status == "pass" and (not self.findings or not all(f.passed for f in self.findings)):
            raise ValueError("a record passes only with findings, all within their budgets")
        if self.status == "fail" and all(f.passed for f in self.findings):
            raise ValueError("a record fails only with a finding over its budget")
        if self.status in ("error", "skip", "oom", "timeout") and not self.reason:
            raise ValueError(f"a record with status {self.status!r} says why")

    @property
    def key(self) -> tuple[str, str, str, str]:
        """Return the key of the question; unique in a run."""
        return self.subject, self.implementation, self.check, self.case

    @property
    def failed(self) -> bool:
        """Return whether it counts as failed."""
        return self.status in FAILED

    @property
    def worst(self) -> Finding | None:
        """Return the finding with the most budgets spent."""
        return max(self.findings, key=lambda f: (not f.passed, f.ratio), default=None)

    def line(self) -> str:
        """Return one line of strict JSON."""
        raw = asdict(self)
        for finding in raw["findings"]:
            if not finding["curve"]:
                del finding["curve"]
        if self.location is None:
            del raw["location"]
        return json.dumps(encode(raw), allow_nan=False)

    @classmethod
    def parse(cls, line: str) -> "Record":
        """Return the record of a line that `line` wrote."""
        raw = json.loads(line)
        raw["findings"] = tuple(_finding(f) for f in raw["findings"])
        raw["location"] = Location.parse(raw["location"]) if raw.get("location") else None
        return cls(**{f.name: raw[f.name] for f in fields(cls)})


def judged(findings: list[Finding]) -> str:
    """Return "pass" or "fail". Raises ValueError without findings: they are no verdict."""
    if not findings:
        raise ValueError("a check without findings has judged nothing")
    return "pass" if all(f.passed for f in findings) else "fail"


def _finding(raw: dict[str, Any]) -> Finding:
    numbers = {k: _number(raw[k]) for k in ("error", "budget", "scale")}
    curve = tuple(_number(x) for x in raw.get("curve", ()))
    return Finding(**raw | numbers | {"worst": tuple(raw["worst"]), "curve": curve})


def _number(raw: Any) -> float:
    return math.inf if raw == "inf" else raw


def encode(value: Any) -> Any:
    """Return the value with "inf" for infinity and NaN, which JSON lacks."""
    if isinstance(value, float) and not math.isfinite(value):
        return "inf"
    if isinstance(value, dict):
        return {k: encode(v) for k, v in value.items()}
    return [encode(v) for v in value] if isinstance(value, (list, tuple)) else value
