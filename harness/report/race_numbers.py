"""The large numbers and the sentence of what is no model's curve: operators, loops, streams, chunks, readers of videos."""

import math
from collections.abc import Iterable, Sequence

from harness.bench import grids
from harness.records.speed import Point, Speed
from harness.report import chunking, loop, reading, streaming, things, words
from harness.report.curves import memory, seconds
from harness.report.html import Number
from harness.report.overview import KINDS, kind_of
from harness.report.speed_tables import number

UPSTREAM = KINDS[2]
STOCK = "qwen2"  # the model that Vamba replaces
MOST = 5  # numbers


def sentence(speeds: Sequence[Speed]) -> str:
    """Return the sentence on what is no model's curve; "" where there is nothing to compare."""
    parts = (_operators_in_words, _loop_in_words, _stream_in_words, _data_in_words)
    return next(filter(None, (said(speeds) for said in parts)), "")


def capital(text: str) -> str:
    """Return text with a large first letter."""
    return text[:1].upper() + text[1:]


def span(ratios: Sequence[float]) -> str:
    """Return the least and the largest with two digits, such as "1.0 to 6.1"."""
    low, high = (f"{x:.{max(0, 1 - math.floor(math.log10(x)))}f}" for x in (min(ratios), max(ratios)))
    return low if low == high else f"{low} to {high}"


def operators(speeds: Sequence[Speed]) -> list[Number]:
    """Return how many times as fast as its rival each operator is; of one alone, a number for each of its first points."""
    found = _against(speeds)
    if len(found) != 1:
        return [
            Number(span(ratios) + "x", "", f"as fast as {rival}: {words.race(race)}, {len(ratios)} sizes and modes")
            for race, (rival, ratios) in found.items()
        ]
    numbers = []
    for point in dict.fromkeys(s.point for s in speeds if s.point.race in found):
        there = [s for s in speeds if s.point == point and s.seconds]
        ours, others = _least(there, "ours"), [s for s in there if s.entry.role == "rival"]
        if ours is None or not others:
            continue
        others.sort(key=lambda s: (kind_of(s) is not UPSTREAM, abs(math.log(seconds(s) / seconds(ours)))))
        times = [(things.of(s.entry).label, span([seconds(s) / seconds(ours)])) for s in others[:3]]
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
        said.append(f"{words.race(race)} is {span(ratios)} times as fast as {rival}")
        stock = [s for s in speeds if s.point.race == race and s.entry.subject == STOCK and s.seconds]
        pairs = [(s, _least([t for t in speeds if t.point == s.point], "ours")) for s in stock]
        if times := [seconds(s) / seconds(ours) for s, ours in pairs if ours]:
            said[-1] += f", and {span(times)} times as fast as {things.of(stock[0].entry).label}"
    return capital("; ".join(said)) + "." if said else ""


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
            said = f"{loop.title(where)}: {span([most])} times as fast as {rival}"
            said += f" and {span([vit])} times as fast as a ViT" if vit else ""
            return f"{said} in a user's loop, each in its best form."
    return ""


def loops(speeds: Sequence[Speed]) -> list[Number]:
    """Return how many times as fast as its rivals each loop is, then the host's time a layer."""
    found, hosts = [], []
    for where, mine in loop.grouped(speeds).items():
        ours, rival, vit = loop.best(mine, "ours"), loop.advantage(mine, "upstream"), loop.advantage(mine, "ViT")
        if ours and (rival or vit):
            first = rival or vit or 0.0
            said = "as fast as upstream" + (f"; against a ViT {span([vit])}x" if vit else "") if rival else "as fast as a ViT"
            said += f", each in its best form: a user's loop, {loop.title(where)}"
            found.append((first, Number(f"{span([first])}x", "", said)))
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


def streams(speeds: Sequence[Speed]) -> list[Number]:
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


def chunks(speeds: Sequence[Speed]) -> list[Number]:
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


def readers(speeds: Sequence[Speed]) -> list[Number]:
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
    return f"One core reads clips {span(ratios)} times as fast as {things.look(reading.LOOP).label}." if ratios else ""
