"""The first screen of a benchmark: a sentence and a few large numbers, each with its unit and its rival."""

import math
from collections.abc import Iterable, Sequence

from harness.bench import grids
from harness.records.speed import Point, Speed
from harness.report import chunking, loop, reading, streaming, things, words
from harness.report.curves import Family, meeting, memory, seconds
from harness.report.html import Number
from harness.report.overview import KINDS, kind_of
from harness.report.speed_figures import tokens
from harness.report.speed_tables import number

OURS, KEPT, UPSTREAM, VITS = KINDS
STOCK = "qwen2"  # the model that Vamba replaces
MOST = 5  # numbers


def main_family(families: Sequence[Family]) -> Family | None:
    """Return the family that the first screen shows: of the largest model, in inference where it was timed."""
    return min(reversed(families), key=lambda f: (f.mode != "infer", f.race != "middle"), default=None)


def numbers(speeds: Sequence[Speed], families: Sequence[Family]) -> list[Number]:
    """Return at most five numbers of what was timed: speed, where the ViT is met, memory, the host's time."""
    found = [*_models(families), *_memory(speeds)]
    found = found or _operators(speeds)
    return [*found, *_loop(speeds), *_stream(speeds), *_chunks(speeds), *_data(speeds)][:MOST]


def sentence(speeds: Sequence[Speed], families: Sequence[Family]) -> str:
    """Return what the numbers say in a sentence; "" where there are none."""
    family = main_family(families)
    if family is None:
        if told := _others_in_words(speeds):
            return told
        found = numbers(speeds, families)[:1]
        return "".join(_capital(" ".join(f"{n.value} {n.unit} {n.label}.".split())) for n in found)
    said, ratios = [], _ratios(family)
    if ratios:
        said.append(f"{_range(ratios)} times as fast as upstream in {words.MODES[family.mode]}")
    if (met := _meeting(family, OURS)) is not None:
        at, last = met
        if at:
            said.append(f"faster than a ViT of similar size from {tokens(at)} tokens{_frames(at, last, ' (%s)')} on")
        elif _last_ratio(family) < 1:
            said.append("faster than a ViT of similar size at every length timed")
        else:
            said.append("no faster than a ViT of similar size at any length timed")
    return f"{words.race(family.race)} is {' and '.join(said)}." if said else ""


def _others_in_words(speeds: Sequence[Speed]) -> str:
    """Return the sentence on what is no model's curve; "" where there is nothing to compare."""
    parts = (_operators_in_words, _loop_in_words, _stream_in_words, _data_in_words)
    return next(filter(None, (said(speeds) for said in parts)), "")


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _range(ratios: Sequence[float]) -> str:
    """Return the least and the largest with two digits, such as "1.0 to 6.1"."""
    low, high = (f"{x:.{max(0, 1 - math.floor(math.log10(x)))}f}" for x in (min(ratios), max(ratios)))
    return low if low == high else f"{low} to {high}"


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


def _last_ratio(family: Family) -> float:
    """Return the time of our fastest curve over the fastest ViT's, at the longest clip that both were timed at; 1 if none."""
    mine, vits = _fastest(family, OURS), _fastest(family, VITS)
    both = [n for n in mine if n in vits]
    return seconds(mine[max(both)]) / seconds(vits[max(both)]) if both else 1.0


def _models(families: Sequence[Family]) -> list[Number]:
    family, found = main_family(families), []
    if family is None:
        return []
    name, how = words.race(family.race), f"{words.MODES[family.mode]}, batch {dict(family.dims)['B']}"
    if ratios := _ratios(family):
        found.append(Number(_range(ratios) + "x", "", f"as fast as upstream: {name}, {how}"))
    if met := _meeting(family, OURS):
        at, last = met
        frames = _frames(at, last, ", %s") if at else ""
        other = _meeting(family, UPSTREAM)
        beside = f"; upstream from {tokens(other[0])}" if other and other[0] else "; upstream nowhere" if other else ""
        label = f"a clip{frames}: from here on {name} is faster than the ViT{beside}"
        never = Number("faster" if _last_ratio(family) < 1 else "slower", "", f"than the ViT at every length: {name}, {how}")
        found.append(Number(tokens(at), "tokens", label) if at else never)
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
            what = f"peak memory of a training step, {words.point(point)}"
            return [Number(number(least[OURS]), "GiB", what + beside)] if point.clips else []
    return []


def _operators(speeds: Sequence[Speed]) -> list[Number]:
    """Return how many times as fast as its rival each operator is; of one alone, a number for each of its first points."""
    found = _against(speeds)
    if len(found) != 1:
        return [
            Number(_range(ratios) + "x", "", f"as fast as {rival}: {words.race(race)}, {len(ratios)} sizes and modes")
            for race, (rival, ratios) in found.items()
        ]
    numbers = []
    for point in dict.fromkeys(s.point for s in speeds if s.point.race in found):
        there = [s for s in speeds if s.point == point and s.seconds]
        ours, others = _least(there, "ours"), [s for s in there if s.entry.role == "rival"]
        if ours is None or not others:
            continue
        others.sort(key=lambda s: (kind_of(s) is not UPSTREAM, abs(math.log(seconds(s) / seconds(ours)))))
        times = [(things.of(s.entry).label, _range([seconds(s) / seconds(ours)])) for s in others[:3]]
        (rival, first), *rest = times
        said = f"as fast as {rival}" + "".join(f"; against {label} {times}x" for label, times in rest)
        said += f": {words.point(point, with_way=True)}, {words.MODES[point.mode]}"
        order = kind_of(others[0]) is not UPSTREAM, -seconds(others[0]) / seconds(ours)
        numbers.append((*order, Number(f"{first}x", "", said)))
    return [number for *_, number in sorted(numbers, key=lambda line: line[:2])][:MOST]


def _operators_in_words(speeds: Sequence[Speed]) -> str:
    """Return how many times as fast as upstream, and as another model, the operators are."""
    said = []
    for race, (rival, ratios) in _against(speeds).items():
        said.append(f"{words.race(race)} is {_range(ratios)} times as fast as {rival}")
        stock = [s for s in speeds if s.point.race == race and s.entry.subject == STOCK and s.seconds]
        pairs = [(s, _least([t for t in speeds if t.point == s.point], "ours")) for s in stock]
        if times := [seconds(s) / seconds(ours) for s, ours in pairs if ours]:
            said[-1] += f", and {_range(times)} times as fast as {things.of(stock[0].entry).label}"
    return _capital("; ".join(said)) + "." if said else ""


def _against(speeds: Sequence[Speed]) -> dict[str, tuple[str, list[float]]]:
    """Return for each race of operators its rival, upstream or what stands for it, and how many times ours its times are."""
    found: dict[str, tuple[str, list[float]]] = {}
    for race in grids.races("operators"):
        points: dict[Point, list[Speed]] = {}
        for s in speeds:
            if s.point.race == race and s.seconds:
                points.setdefault(s.point, []).append(s)
        for there in points.values():
            ours, other = _least(there, "ours"), _least([s for s in there if kind_of(s) is UPSTREAM], "rival")
            if ours and other:
                label = things.of(other.entry).label
                label = "upstream" if label.startswith("upstream") else label
                found.setdefault(race, (label, []))[1].append(seconds(other) / seconds(ours))
    return found


def _least(speeds: Iterable[Speed], role: str) -> Speed | None:
    """Return the fastest of a role."""
    return min((s for s in speeds if s.seconds and s.entry.role == role), key=seconds, default=None)


def _loop_in_words(speeds: Sequence[Speed]) -> str:
    """Return how much faster than its rivals the loop is in which upstream, or without it a ViT, is slowest."""
    for kind, rival in (("upstream", "upstream"), ("ViT", "a ViT")):
        found = [(loop.advantage(mine, kind) or 0.0, where, mine) for where, mine in loop.grouped(speeds).items()]
        most, where, mine = max(found, key=lambda place: place[0], default=(0.0, (), []))
        if most:
            vit = loop.advantage(mine, "ViT") if kind == "upstream" else None
            said = f"{loop.title(where)}: {_range([most])} times as fast as {rival}"
            said += f" and {_range([vit])} times as fast as a ViT" if vit else ""
            return f"{said} in a user's loop, each in its best form."
    return ""


def _loop(speeds: Sequence[Speed]) -> list[Number]:
    found, hosts = [], []
    for where, mine in loop.grouped(speeds).items():
        ours, rival, vit = loop.best(mine, "ours"), loop.advantage(mine, "upstream"), loop.advantage(mine, "ViT")
        if ours and (rival or vit):
            first = rival or vit or 0.0
            said = "as fast as upstream" + (f"; against a ViT {_range([vit])}x" if vit else "") if rival else "as fast as a ViT"
            said += f", each in its best form: a user's loop, {loop.title(where)}"
            found.append((first, Number(f"{_range([first])}x", "", said)))
            if ours.host:
                said = f"of the host's time a layer: {loop.title(where)}, {ours.point.way}"
                hosts.append(Number(f"{1e3 * ours.host[-1]:.2g}", "ms", said))
    ratios = [n for _, n in sorted(found, key=lambda pair: -pair[0])]
    return ratios[:3] + hosts[-1:]


def _stream_in_words(speeds: Sequence[Speed]) -> str:
    """Return what the next frame of a long stream costs, by model."""
    found = _longest_streams(speeds)
    each = ", ".join(f"{number(1e3 * seconds(s))} ms by {words.model(s.entry.variant)}" for s in found)
    return f"After {found[0].point['A']:,} frames of a stream the next one takes {each}." if found else ""


def _longest_streams(speeds: Sequence[Speed]) -> list[Speed]:
    """Return our fastest time of each model after the most frames, the fastest model first."""
    mine = [s for s in speeds if s.point.race == streaming.RACE and s.seconds and s.entry.role == "ours"]
    last = max((s.point["A"] for s in mine), default=0)
    best: dict[str, Speed] = {}
    for s in sorted((s for s in mine if s.point["A"] == last), key=seconds):
        best.setdefault(s.entry.variant, s)
    return list(best.values())


def _stream(speeds: Sequence[Speed]) -> list[Number]:
    """Return what the next frame of a long stream costs, a number a model, then the memory of the largest."""
    found = []
    for s in _longest_streams(speeds):
        last = s.point["A"]
        how = {"graph": "by a CUDA graph"}.get(s.point.way, s.point.way)
        said = f"for the next frame of a stream after {last:,} others: {words.model(s.entry.variant)}, {how}"
        found.append(Number(number(1e3 * seconds(s)), "ms", said))
    if found and (held := memory(s)):
        said = f"peak memory of a stream after {last:,} frames: {words.model(s.entry.variant)}"
        found.append(Number(number(held / 2**20), "MiB", said))
    return found


def _chunks(speeds: Sequence[Speed]) -> list[Number]:
    """Return the least memory of the longest video in chunks, beside that of the whole video at once where it was timed."""
    mine = [s for s in speeds if s.point.race == chunking.RACE and s.seconds and memory(s)]
    cut = [s for s in mine if s.point.way not in chunking.WHOLE]
    found = []
    for mode in sorted({s.point.mode for s in cut}):
        for T in sorted({s.point["T"] for s in cut if s.point.mode == mode}, reverse=True):
            s = min((s for s in cut if (s.point["T"], s.point.mode) == (T, mode)), key=lambda s: memory(s) or 0)
            whole = [memory(w) or 0 for w in mine if chunking.video(w) == chunking.video(s) and w.point.way in chunking.WHOLE]
            beside = f"; the whole at once {number(min(whole) / 2**30)}" if whole else ""
            said = f"for a video of {T:,} frames, {s.point['F']} at a time, {words.MODES[mode]}{beside}"
            found.append(Number(number((memory(s) or 0) / 2**30), "GiB", said))
    return found


def _data(speeds: Sequence[Speed]) -> list[Number]:
    """Return how many clips of the shortest length one core reads, a number a distance of key frames, one with resizing."""
    mine = [s for s in speeds if s.point.race == reading.RACE and s.seconds]
    shortest = min((s.point["T"] for s in mine), default=0)
    rates = {(s.point["G"], s.entry.implementation): 1 / seconds(s) for s in mine if s.point["T"] == shortest}
    found = []
    for gop in sorted({gop for gop, _ in rates}):
        for name, what in ((reading.FRAMES_ONLY, "frames of full size"), (reading.CLIP, "resized")):
            if (gop, name) in rates and (name == reading.FRAMES_ONLY or gop == min(gop for gop, _ in rates)):
                rival = rates.get((gop, reading.LOOP)) if name == reading.FRAMES_ONLY else None
                beside = f"; {things.look(reading.LOOP).label} {number(rival)}" if rival else ""
                said = f"by one core: {shortest} frames a clip, {what}, a key frame every {gop}{beside}"
                found.append(Number(number(rates[gop, name]), "clips/s", said))
    return found


def _data_in_words(speeds: Sequence[Speed]) -> str:
    """Return how many times as many clips as a loop over PyAV one core reads."""
    times: dict[object, dict[str, float]] = {}
    for s in speeds:
        if s.point.race == reading.RACE and s.seconds:
            times.setdefault(s.point, {})[s.entry.implementation] = seconds(s)
    ours, rival = reading.FRAMES_ONLY, reading.LOOP
    ratios = [of[rival] / of[ours] for of in times.values() if ours in of and rival in of]
    return f"One core reads clips {_range(ratios)} times as fast as {things.look(reading.LOOP).label}." if ratios else ""
