"""BIMBA's compressor over the number of frames, beside other ways to as few tokens: time, memory, and where that ends."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from harness.records.speed import Entry, Speed
from harness.report import things, words
from harness.report.curves import ENDED, memory
from harness.report.figures import Drawing, End, chart, hidden, label_ends, line_look, logarithmic, ticks
from harness.report.speed_figures import LATENCY, WORDS

RACE = "bimba"


def draw(speeds: Iterable[Speed], folder: Path) -> list[Drawing]:
    """Draw time and peak memory over frames, for each mode, dtype and recipe of which several numbers of frames were timed.

    A recipe is the grid of a frame, the queries of every query frame, the frames of each of these, and the width.
    """
    panels: dict[tuple[object, ...], list[Speed]] = {}
    for s in speeds:
        p = s.point
        if p.race == RACE:
            recipe = p.mode, p.dtype, *(p[letter] for letter in "BHWQD"), p["F"] / p["G"]
            panels.setdefault(recipe, []).append(s)
    drawn = []
    for mine in panels.values():
        if len({s.point["F"] for s in mine if s.seconds}) > 1:
            held = "peak memory of a call (GiB)", lambda s: (memory(s) or 0) / 2**30
            drawn += [_draw(mine, *LATENCY, "", folder), _draw(mine, *held, "-memory", folder)]
    return drawn


def _draw(speeds: Sequence[Speed], what: str, value: Callable[[Speed], float], suffix: str, folder: Path) -> Drawing:
    """Draw a line for each entry, and a cross where it first ran out of memory or time."""
    p, lines = speeds[0].point, dict[Entry, list[Speed]]()
    for s in sorted(speeds, key=lambda s: s.point["F"]):
        lines.setdefault(s.entry, []).append(s)
    stem = "-".join(["frames", p.mode, RACE, *(f"{letter}{p[letter]}" for letter in "BHWQD"), p.dtype]) + suffix
    ends, shown, said = [], [], []
    with chart(folder, stem) as axes:
        for entry, mine in sorted(lines.items(), key=lambda pair: things.rank(pair[0].implementation, pair[0].subject)):
            look = things.of(entry)
            line = {float(s.point["F"]): value(s) for s in mine if s.seconds and value(s) > 0}
            if line:
                axes.plot(list(line), list(line.values()), **line_look(look))
                ends.append(End(*list(line.items())[-1], look))
                shown.append((look.label, line))
            if ended := next((s for s in mine if s.status in ENDED), None):
                axes.plot(ended.point["F"], 1, "x", color=look.colour, markersize=8, markeredgewidth=2, clip_on=False,
                          transform=axes.get_xaxis_transform())  # fmt: skip
                said.append(f"x: {WORDS[ended.status]} at {ended.point['F']} frames ({look.label})")
        axes.set(xlabel=f"frames of {p['H']} x {p['W']} tokens", ylabel=what, xscale="log", yscale="log")
        ticks(axes.xaxis, [s.point["F"] for s in speeds])
        logarithmic(axes.yaxis)
        label_ends(axes, ends)
    recipe = f"{p['H'] * p['W'] * p['F'] // (p['G'] * p['Q'])} tokens to one, width {p['D']:,}, {p.dtype}"
    title = f"{words.race(RACE)} over frames, {words.MODES[p.mode]}: {what}; {recipe}"
    return Drawing(folder / f"{stem}.svg", "; ".join([title, *said, *hidden(shown)]) + ".")
