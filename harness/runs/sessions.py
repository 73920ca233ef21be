"""The sessions of a run: one for the command that began it, one for every `--resume`."""

from datetime import UTC, datetime
from typing import Any

# What has to be the same in all sessions of a run: the box, what is installed on it, and the sources byte for byte. Where the
# checkout lies is not among them.
SAME = ("gpu", "multiprocessors", "driver", "cuda", "cpu", "cores", "python", "packages", "fingerprints")
SHOWN = 12  # characters of a fingerprint


def begun(about: dict[str, Any]) -> dict[str, Any]:
    """Return a session that begins now, for what run.json says of a run: its command, and those parts of its box that count."""
    return {"started": now(), "status": "running", **_identity(about)}


def of(about: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the sessions that a run.json records. One that records none had one session."""
    single = {key: about[key] for key in ("started", "ended", "status") if key in about}
    return about.get("sessions") or [single | _identity(about)]


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Return a phrase for everything in SAME that differs between two boxes, such as `driver 570.1, then 580.2`."""
    found = []
    for key in SAME:
        old, new = before.get(key), after.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            names = [name for name in old | new if old.get(name) != new.get(name)]
            found += [f"{key} of {name} {_short(old.get(name))}, then {_short(new.get(name))}" for name in names]
        elif old != new:
            found.append(f"{key} {_short(old)}, then {_short(new)}")
    return found


def edited(about: dict[str, Any], fingerprints: dict[str, str | None]) -> list[str]:
    """Return a phrase for every package whose fingerprint is another than the one that a run recorded at its start."""
    before = about.get("box", {}).get("fingerprints")
    return differences({"fingerprints": before}, {"fingerprints": fingerprints}) if before else []


def changed_sources(about: dict[str, Any]) -> list[str]:
    """Return a phrase for every package that a session found changed at its end, with the session's number."""
    return [f"{phrase} (session {number})" for number, s in enumerate(of(about), 1) for phrase in s.get("changed", [])]


def now() -> str:
    """Return the time in UTC, to the second, in ISO format."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _identity(about: dict[str, Any]) -> dict[str, Any]:
    """Return the command, and the parts of the box that count."""
    box = about.get("box", {})
    return {"command": about.get("command"), "box": {key: box[key] for key in (*SAME, "git") if key in box}}


def _short(value: object) -> str:
    """Return a value in few characters."""
    text = "none" if value is None else str(value)
    return text[:SHOWN] if len(text) == 64 else text
