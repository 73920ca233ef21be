"""Speeds as Markdown tables and sentences."""

from collections import Counter
from collections.abc import Iterable, Sequence

from harness.records.speed import Entry, Point, Speed
from harness.report import words
from harness.report.curves import MAMBA, VIT, Family, fault_note, median, meeting, memory, seconds
from harness.report.markdown import Markdown, bold, escape, join, table
from harness.report.speed_figures import tokens

PLAIN = {"oom": "out of memory", "timeout": "out of time", "error": "failed", "gated": "not timed"}


def number(x: float) -> str:
    """Return three digits, with commas and no powers of ten."""
    return f"{float(f'{x:.3g}'):,.12g}"


def milliseconds(speed: Speed) -> str:
    """Return the median with its interval, or in bold why there is none. Of fewer than three samples it is their range."""
    if not speed.seconds:
        return status(speed)
    m = median(speed.seconds)
    few = f", n = {len(speed.seconds)}" * (len(speed.seconds) < 3)
    return f"{number(1e3 * m.middle)} [{number(1e3 * m.low)}, {number(1e3 * m.high)}{few}]"


def status(speed: Speed) -> str:
    """Return why a speed is missing."""
    if speed.status == "implied":
        return Markdown(f"not tried: {escape(speed.reason)}")
    word = bold(PLAIN[speed.status])
    return word if speed.status == "oom" else Markdown(f"{word}: {escape(speed.reason, 200)}")


def notes(speed: Speed) -> str:
    """Return the notes on a speed."""
    said: list[str] = [bold(fault_note(speed), 200)] if fault_note(speed) else []
    return join(said + ["timed alone"] * speed.alone, "; ")


def ratio(speed: Speed, to: Speed | None) -> str:
    """Return the time over that of another speed, with the faults of the latter."""
    if to is None or not speed.seconds:
        return "-"
    fault = f" ({escape(fault_note(to), 60)})" * bool(fault_note(to))
    return Markdown(f"{seconds(speed) / seconds(to):.3g}{fault}")


def entry_name(entry: Entry) -> str:
    """Return an entry's name, with the mark of a rival."""
    return entry.name + " (rival)" * (entry.role == "rival")


def percent(speed: Speed) -> str:
    """Return the share of the roofline in per cent, or why there is none; "-" without a time or a bound."""
    if speed.no_bound:
        return f"no bound: {speed.no_bound}"
    share = 100 * (speed.share or 0.0)
    return "-" if not share else f"{share:.2g} %" if share < 99.5 else f"{share:.0f} %"


def operators(speeds: Sequence[Speed]) -> str:
    """Return the table of one operator's race."""
    best = fastest(s for s in speeds if s.entry.role == "rival")
    rows = [
        (words.letters(s.point), s.point.mode, entry_name(s.entry), milliseconds(s),
         percent(s),
         _size(s, 2**20), ratio(s, best.get(s.point)), notes(s))
        for s in speeds
    ]  # fmt: skip
    head = ["point", "mode", "entry", "ms, median [95 %]", "share of roofline", "peak MiB", "time / fastest rival's", "notes"]
    return table(head, rows)


def models(speeds: Sequence[Speed]) -> str:
    """Return the table of one race of models in one mode."""
    best = fastest(s for s in speeds if s.entry.subject == VIT)
    rows = []
    for s in speeds:
        p, t = s.point, seconds(s) if s.seconds else 0.0
        rates = (number(p["B"] / t), number(p.tokens / t), _size(s, 2**30)) if t else ("-", "-", "-")
        clip = f"{p['B']} x {p['T']} x {p['S']} px" if p.clips else f"{p['B']}, as tokens"
        rows.append((clip, f"{p['L']:,}", p.way, entry_name(s.entry), milliseconds(s), *rates, ratio(s, best.get(p)), notes(s)))
    head = ["clips x frames", "tokens a clip", "way", "entry", "ms, median [95 %]", "clips/s", "tokens/s", "peak GiB"]
    return table([*head, "time / fastest ViT's", "notes"], rows)


def _size(speed: Speed, unit: int) -> str:
    """Return the peak memory of a call in units of so many bytes."""
    held = memory(speed)
    return number(held / unit) if held else "-"


def fastest(speeds: Iterable[Speed]) -> dict[Point, Speed]:
    """Return the fastest of those with a speed, at every point."""
    best: dict[Point, Speed] = {}
    for s in speeds:
        if s.seconds and (s.point not in best or seconds(s) < seconds(best[s.point])):
            best[s.point] = s
    return best


def meetings(family: Family) -> str:
    """Return where every VideoMamba of a family meets the fastest ViT, in words."""
    lines = []
    for curve in family.of(MAMBA):
        m, name = meeting(family, curve), bold(family.name(curve))
        if not m.lengths:
            lines.append(f"- {name}: no ViT has a time where it has one ({curve.way}).")
            continue
        ends = f"{m.lengths[0]:,} to {m.lengths[-1]:,} tokens" if len(m.lengths) > 1 else f"{m.lengths[0]:,} tokens"
        last = m.ratios[-1]
        if m.at:
            word = "is faster from there on" if last < 1 else "is slower from there on" if last > 1 else "was not timed beyond"
            said = f"meets the fastest ViT at **{tokens(m.at)} tokens** a clip and {word} (timed at {ends})"
        else:
            low, high = sorted((m.ratios[0], m.ratios[-1]))
            said = f"does not meet the fastest ViT; {'faster' if last < 1 else 'slower'} everywhere from {ends}"
        said += f"; its time over the ViT's is {m.ratios[0]:.3g} at the shortest and {last:.3g} at the longest"
        if doubts := sorted({fault_note(s) for s in (*m.rivals, *curve.timed)} - {""}):
            said += f"; **{'; '.join(escape(d, 100) for d in doubts)}**"
        lines.append(f"- {name} {said}.")
    return "\n".join(lines) or "- No VideoMamba has a time."


def missing(speeds: Iterable[Speed], status: str) -> list[str]:
    """Return a line for each entry without a speed and reason, with the number of points."""
    found = Counter((escape(entry_name(s.entry)), escape(s.reason, 300)) for s in speeds if s.status == status)
    return [f"{name}, {n} {'point' if n == 1 else 'points'}: {why}" for (name, why), n in found.items()]
