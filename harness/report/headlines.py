"""The first screen of a benchmark: a sentence and a few large numbers, each with its unit and its rival."""

import math
from collections.abc import Iterable, Sequence

from harness.bench import grids
from harness.records.speed import Speed
from harness.report import curves, race_numbers, words
from harness.report.curves import Family, meeting, memory, seconds
from harness.report.html import Number
from harness.report.overview import KINDS, kind_of, ours_at, same_models
from harness.report.race_numbers import MOST, capital, span
from harness.report.speed_figures import tokens
from harness.report.speed_tables import number

OURS, KEPT, UPSTREAM, VITS = KINDS


def main_family(families: Sequence[Family]) -> Family | None:
    """Return the family that the first screen shows: of the largest model, in inference where it was timed."""
    return min(reversed(families), key=lambda f: (f.mode != "infer", f.race != "middle"), default=None)


def numbers(speeds: Sequence[Speed], families: Sequence[Family]) -> list[Number]:
    """Return at most five numbers of what was timed: speed, where the ViT is met, memory, the host's time."""
    found = [*_models(families, speeds), *_memory(speeds), *_training(families)]
    found = found or race_numbers.operators(speeds)
    others = race_numbers.loops, race_numbers.streams, race_numbers.chunks, race_numbers.readers
    return [*found, *(number for of in others for number in of(speeds))][:MOST]


def sentence(speeds: Sequence[Speed], families: Sequence[Family]) -> str:
    """Return what the numbers say in a sentence; "" where there are none."""
    family = main_family(families)
    if family is None:
        if told := race_numbers.sentence(speeds):
            return told
        found = numbers(speeds, families)[:1]
        return "".join(capital(" ".join(f"{n.value} {n.unit} {n.label}.".split())) for n in found)
    said, ratios = [], _ratios(family)
    if ratios:
        said.append(f"{span(ratios)} times as fast as upstream in {words.MODES[family.mode]}")
    if (met := _meeting(family, OURS)) is not None:
        at, last = met
        if at:
            at, but = _in_better_form(at, family, speeds)
            said.append(f"faster than a ViT of similar size from {tokens(at)} tokens{_frames(at, last, ' (%s)')} on{but}")
        elif _last_ratio(family) < 1:
            said.append("faster than a ViT of similar size at every length timed")
        else:
            said.append("no faster than a ViT of similar size at any length timed")
    return f"{words.race(family.race)} is {' and '.join(said)}." if said else ""


def _frames(at: float, last: Speed, pattern: str = "%s") -> str:
    """Return how many frames a number of tokens are, in clips such as those of a speed."""
    frames = (at - 1) * last.point["T"] / (last.point["L"] - 1) if last.point["L"] > 1 else 0
    return pattern % f"{frames:.0f} frames" if frames else ""


def _ratios(family: Family) -> list[float]:
    """Return how many times our fastest's time upstream's fastest takes, at each length in the main way."""
    ours, theirs = (_fastest(family, which) for which in (OURS, UPSTREAM))
    return [seconds(theirs[n]) / seconds(ours[n]) for n in ours if n in theirs]


def _fastest(family: Family, which: object) -> dict[int, Speed]:
    found: dict[int, Speed] = {}
    for s in (s for c in family.curves if c.way == family.main_way for s in c.timed):
        length = s.point["L"]
        if kind_of(s) is which and (length not in found or seconds(s) < seconds(found[length])):
            found[length] = s
    return found


def _meeting(family: Family, which: object) -> tuple[float | None, Speed] | None:
    """Return where a kind's fastest curve meets the ViT, and its last point; None without both."""
    mine = [c for c in family.curves if c.way == family.main_way and c.timed and kind_of(c.timed[-1]) is which]
    best = min(mine, key=lambda c: (-c.timed[-1].point["L"], seconds(c.timed[-1])), default=None)
    return (meeting(family, best).at, best.timed[-1]) if best and meeting(family, best).lengths else None


def _in_better_form(at: float, family: Family, speeds: Sequence[Speed]) -> tuple[float, str]:
    """Return from how many tokens on ours is faster than the ViT, which without a class token can be more than `at`, and what
    to say where these tokens are not reached without one."""
    for without in (f for f in curves.families(speeds, clips=False) if same_models(f, family)):
        if ours_at(without) == math.inf:
            longest = max(s.point["L"] for s in without.fastest_vit(without.main_way).values())
            return at, f", without a class token not up to {longest:,}"
        at = max(at, ours_at(without))
    return at, ""


def _last_ratio(family: Family) -> float:
    """Return the time of our fastest curve over the fastest ViT's, at the longest clip that both were timed at; 1 if none."""
    mine, vits = _fastest(family, OURS), _fastest(family, VITS)
    both = [n for n in mine if n in vits]
    return seconds(mine[max(both)]) / seconds(vits[max(both)]) if both else 1.0


def _models(families: Sequence[Family], speeds: Sequence[Speed] = ()) -> list[Number]:
    family, found = main_family(families), []
    if family is None:
        return []
    name, how = words.race(family.race), f"{words.MODES[family.mode]}, batch {dict(family.dims)['B']}"
    if ratios := _ratios(family):
        found.append(Number(span(ratios) + "x", "", f"as fast as upstream: {name}, {how}"))
    if met := _meeting(family, OURS):
        at, last = met
        at, but = _in_better_form(at, family, speeds) if at else (at, "")
        frames = _frames(at, last, ", %s") if at else ""
        other = _meeting(family, UPSTREAM)
        beside = ""
        if other:
            beside = f"; upstream from {tokens(other[0])}" if other[0] else f"; upstream not up to {other[1].point['L']:,}"
        label = f"a clip{frames}: from here on {name} is faster than the ViT{but}{beside}"
        never = Number("faster" if _last_ratio(family) < 1 else "slower", "", f"than the ViT at every length: {name}, {how}")
        found.append(Number(tokens(at), "tokens", label) if at else never)
    return found


def _training(families: Sequence[Family]) -> list[Number]:
    """Return how many times as fast as upstream the main model trains, where the main family is of inference."""
    main = main_family(families)
    others = [f for f in families if main and (f.race, f.dims, f.mode) == (main.race, main.dims, "train") and f is not main]
    return [n for family in others[:1] for n in _models([family]) if n.value.endswith("x")]


def _memory(speeds: Iterable[Speed]) -> list[Number]:
    """Return our least peak memory of an eager training step of the largest model, on the longest clip that all could time."""
    models = grids.races("models")
    steps = [s for s in speeds if s.seconds and s.point.race in models and s.point.mode == "train"]
    steps = [s for s in steps if s.point.way == "eager" and memory(s)]
    races = sorted({s.point.race for s in steps}, key=lambda race: race != "middle")
    for point in sorted({s.point for s in steps if s.point.race in races[:1]}, key=lambda p: -p["L"]):
        there = {which: [s for s in steps if s.point == point and kind_of(s) is which] for which in (OURS, UPSTREAM, VITS)}
        least = {which: min(memory(s) or 0 for s in some) / 2**30 for which, some in there.items() if some}
        if OURS in least and len(least) == len({kind_of(s) for s in steps} & set(there)):
            beside = "".join(
                f"; {word} {number(least[which])}" for which, word in ((UPSTREAM, "upstream"), (VITS, "ViT")) if which in least
            )
            what = f"peak memory of a training step, {words.point(point)}"
            return [Number(number(least[OURS]), "GiB", what + beside)] if point.clips else []
    return []
