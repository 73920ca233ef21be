"""The first screen of a benchmark: a sentence and a few large numbers, each with its unit and its rival."""

from collections.abc import Iterable, Sequence

from harness.bench import grids
from harness.records.speed import Speed
from harness.report import chunking, loop, reading, streaming
from harness.report.curves import Family, meeting, memory, seconds
from harness.report.html import Number
from harness.report.overview import KINDS, kind_of
from harness.report.speed_figures import tokens
from harness.report.speed_tables import number

SIZES = {"tiny": "VideoMamba-Ti", "small": "VideoMamba-S", "middle": "VideoMamba-M"}
MODE = {"infer": "inference", "train": "training"}
OURS, KEPT, UPSTREAM, VITS = KINDS


def main_family(families: Sequence[Family]) -> Family | None:
    """Return the family that the first screen shows: of the largest model, in inference where it was timed."""
    return min(reversed(families), key=lambda f: (f.mode != "infer", f.race != "middle"), default=None)


def numbers(speeds: Sequence[Speed], families: Sequence[Family]) -> list[Number]:
    """Return at most five numbers of what was timed: speed, where the ViT is met, memory, the host's time."""
    found = [*_models(families), *_memory(speeds)]
    found = found or _operators(speeds)
    return [*found, *_loop(speeds), *_stream(speeds), *_chunks(speeds), *_data(speeds)][:5]


def sentence(speeds: Sequence[Speed], families: Sequence[Family]) -> str:
    """Return what the numbers say in a sentence; "" where there are none."""
    family = main_family(families)
    if family is None:
        found = numbers(speeds, families)[:1]
        return "".join(" ".join(f"{n.value} {n.unit} {n.label}.".split()) for n in found)
    said, ratios = [], _ratios(family)
    if ratios:
        said.append(
            f"{SIZES.get(family.race, family.race)} is {_range(ratios)} times as fast as upstream in {MODE[family.mode]}"
        )
    if (met := _meeting(family, OURS)) is not None:
        at, _ = met
        said.append(
            f"faster than a ViT of similar size from {tokens(at)} tokens on"
            if at
            else "no faster than a ViT at any length timed"
        )
    return " and ".join(said) + "." if said else ""


def _range(ratios: Sequence[float]) -> str:
    low, high = f"{min(ratios):.2g}", f"{max(ratios):.2g}"
    return low if low == high else f"{low} to {high}"


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


def _models(families: Sequence[Family]) -> list[Number]:
    family, found = main_family(families), []
    if family is None:
        return []
    name, how = SIZES.get(family.race, family.race), f"{MODE[family.mode]}, batch {dict(family.dims)['B']}"
    if ratios := _ratios(family):
        found.append(Number(_range(ratios) + "x", "", f"as fast as upstream: {name}, {how}"))
    if met := _meeting(family, OURS):
        at, last = met
        frames = f", {(at - 1) * last.point['T'] / (last.point['L'] - 1):.0f} frames" if at and last.point["L"] > 1 else ""
        other = _meeting(family, UPSTREAM)
        beside = f"; upstream from {tokens(other[0])}" if other and other[0] else "; upstream nowhere" if other else ""
        label = f"from here on {name} is faster than the ViT{frames}{beside}"
        found.append(Number(tokens(at), "tokens", label) if at else Number("nowhere", "", f"{name} meets the ViT, in {how}"))
    return found


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
            what = f"peak memory of a training step, {SIZES.get(point.race, point.race)}, {point['B']} x {point['T']} frames"
            return [Number(number(least[OURS]), "GiB", what + beside)] if point.clips else []
    return []


def _operators(speeds: Sequence[Speed]) -> list[Number]:
    found = []
    for race in grids.races("operators"):
        times: dict[object, dict[object, float]] = {}
        for s in speeds:
            if s.point.race == race and s.seconds:
                kinds = times.setdefault(s.point, {})
                kinds[kind_of(s)] = min(seconds(s), kinds.get(kind_of(s), float("inf")))
        if ratios := [t[UPSTREAM] / t[OURS] for t in times.values() if UPSTREAM in t and OURS in t]:
            found.append(Number(_range(ratios) + "x", "", f"as fast as upstream: {race}, {len(ratios)} sizes and modes"))
    return found


def _loop(speeds: Sequence[Speed]) -> list[Number]:
    found = []
    for where, mine in loop.grouped(speeds).items():
        ours, rival = loop.best(mine, "ours"), loop.advantage(mine, "upstream")
        if ours and rival:
            said = f"as fast as upstream in a user's loop, each in its best form: VideoMamba-{loop.title(where)}"
            found.append((rival, Number(f"{rival:.2g}x", "", said)))
            if ours.host:
                said = f"of the host's time a layer, VideoMamba-{loop.title(where)}, {ours.point.way}"
                found.append((0.0, Number(f"{1e3 * ours.host[-1]:.2g}", "ms", said)))
    ratios = [n for ratio, n in sorted(found, key=lambda pair: -pair[0]) if ratio]
    return ratios[:2] + [n for ratio, n in found if not ratio][-1:]


def _stream(speeds: Sequence[Speed]) -> list[Number]:
    mine = [s for s in speeds if s.point.race == streaming.RACE and s.seconds and s.entry.role == "ours"]
    if not mine:
        return []
    last = max(s.point["A"] for s in mine)
    s = min((s for s in mine if s.point["A"] == last), key=seconds)
    how = {"graph": "by a CUDA graph"}.get(s.point.way, s.point.way)
    model = SIZES.get(s.entry.variant, s.entry.variant)
    return [Number(number(1e3 * seconds(s)), "ms", f"for the next frame of a stream after {last:,} others: {model}, {how}")]


def _chunks(speeds: Sequence[Speed]) -> list[Number]:
    mine = [s for s in speeds if s.point.race == chunking.RACE and s.seconds and s.point.way not in chunking.WHOLE]
    if not mine:
        return []
    s = min(mine, key=lambda s: (-s.point["T"], s.point.mode != "infer", memory(s) or 0))
    return [
        Number(number((memory(s) or 0) / 2**30), "GiB", f"for a video of {s.point['T']:,} frames, {s.point['F']} at a time")
    ]


def _data(speeds: Sequence[Speed]) -> list[Number]:
    mine = [s for s in speeds if s.point.race == reading.RACE and s.seconds and s.entry.implementation == reading.CLIP]
    if not mine:
        return []
    s = min(mine, key=seconds)
    label = f"of clips of {s.point['T']} frames that one core reads and resizes, a key frame every {s.point['G']}"
    return [Number(number(1 / seconds(s)), "clips/s", label)]

