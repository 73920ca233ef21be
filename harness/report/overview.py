"""A benchmark run on half a page, as in the README: our fastest, upstream's fastest and the fastest ViT."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from harness.bench import grids
from harness.records.speed import GPU_WAYS, MODES, Speed
from harness.report import curves, things, words
from harness.report.curves import MAMBA, VIT, Curve, Family, fault_note, meeting, memory, seconds
from harness.report.markdown import Markdown, sparse
from harness.report.speed_figures import tokens
from harness.report.speed_tables import fastest, number, status

OTHER_MODELS = ("qwen2", "resamplers")  # subjects beside ours in its race that are neither upstream's way nor a ViT
APART = (*OTHER_MODELS, "retrieval")  # subjects whose race has a table of its own, with a column an entry
HEAD = ["", "forward, ms", "upstream", "ViT", "roofline", "with backward, ms", "kept", "upstream", "ViT", "roofline"]


def overview(speeds: Sequence[Speed]) -> str:
    """Return one table, a row for each size of an operator or model; models from CUDA graphs where they were timed so."""
    operators, models = [r for r in grids.races("operators") if r not in raced_with_others()], grids.races("models")
    ways = {s.point.way for s in speeds if s.point.race in models}
    rows: dict[tuple[Any, ...], list[Speed]] = {}
    for s in speeds:
        p = s.point
        chosen = "graph" if "graph" in ways else "eager"
        if p.race in operators or (p.race in models and p.way == chosen):
            rows.setdefault((p.race, p.dims, p.way, p.dtype), []).append(s)
    fastest_of = [fastest(filter(which, speeds)) for which in KINDS]
    several = len({dtype for *_, dtype in rows}) > 1
    lines = []
    for mine in rows.values():
        cells = [words.point(mine[0].point, several, with_way=mine[0].point.race in operators)]
        for mode in MODES:
            at = [s for s in mine if s.point.mode == mode]
            best, kept, *rivals = (found.get(at[0].point) if at else None for found in fastest_of)
            cells.append(_ours(best, at))
            if mode == "train":
                cells.append(_other(best, kept))
            cells += [_other(best, rival) for rival in rivals]
            share = best.share if best else None
            cells.append(f"{round(100 * share)} %" if share else "no bound" if best and best.no_bound else "-")
        lines.append(cells)
    if not lines:
        return "No operator or model has a time."
    how = "as CUDA graphs" if "graph" in ways else "eagerly"
    said = ["Medians in ms; in brackets a rival's time over ours: above 1 ours is faster."]
    if any(cell.endswith("x)*") for row in lines for cell in row):
        said.append("`*`: the rival's error was more than a tenth over its budget.")
    said += [f"Models run {how}."] * bool(ways)
    if any(row[6] != "-" for row in lines):
        said.append('"Kept" is ours by backend `native_kept`, which keeps in memory what `native` computes again.')
    said.append(words.draws(line[0] for line in lines))
    return " ".join(filter(None, said)) + "\n\n" + sparse(HEAD, lines)


def raced_with_others() -> list[str]:
    """Return the races of operators in which other models or ways run beside ours: Vamba, BIMBA, retrieval."""
    races = grids.races("operators").items()
    return [name for name, race in races if any(subject in APART for subject, _ in race.contenders)]


def beside_others(speeds: Sequence[Speed]) -> str:
    """Return the times of a race in which other models run beside ours as a table: a row a point, a column an entry."""
    best = fastest(s for s in speeds if s.entry.role == "ours")
    said = "Medians in ms; in brackets the time over our fastest: above 1 ours is faster.\n\n"
    return said + _by_entry(speeds, lambda s: _beside(s, best.get(s.point)))


def memory_beside_others(speeds: Sequence[Speed]) -> str:
    """Return the peak memory in such a race as a table. The replay of a graph allocates nothing, and has none."""
    return _by_entry(speeds, lambda s: number((memory(s) or 0) / 2**30) if memory(s) and s.point.way not in GPU_WAYS else "-")


def _by_entry(speeds: Sequence[Speed], cell: Callable[[Speed], str]) -> str:
    entries = sorted({s.entry for s in speeds}, key=lambda e: (e.role != "ours", e.subject in OTHER_MODELS, e.name))
    points, found = list(dict.fromkeys(s.point for s in speeds)), {(s.point, s.entry): s for s in speeds}
    several = len({p.dtype for p in points}) > 1
    rows = [
        [f"{words.point(p, several, with_way=True)}, {words.MODES[p.mode]}",
         *(cell(found[p, e]) if (p, e) in found else "-" for e in entries)]
        for p in points
    ]  # fmt: skip
    return sparse(["", *map(words.entry, entries)], [row for row in rows if {*row[1:]} != {"-"}])


def _beside(speed: Speed, best: Speed | None) -> str:
    """Return a time in ms, that of another than the best with how many times the best it is."""
    return status(speed) if not speed.seconds else _ours(speed, ()) if speed is best else _other(best, speed)


def most_memory(speeds: Iterable[Speed]) -> list[str]:
    """Return a sentence for each race of models: the least memory of an eager training step, on the longest clip that all
    could time."""
    found = []
    for race in grids.races("models"):
        steps = [s for s in speeds if s.seconds and (s.point.race, s.point.mode, s.point.way) == (race, "train", "eager")]
        kinds = [which for which in KINDS if any(map(which, steps))]
        for point in sorted({s.point for s in steps}, key=lambda p: -p["L"]):
            there = [[s for s in steps if s.point == point and which(s)] for which in kinds]
            if all(there):
                least = (min(some, key=lambda s: memory(s) or 0) for some in there)
                said = [f"{things.of(s.entry).label} {number((memory(s) or 0) / 2**30)} GiB" for s in least]
                found.append(f"- Peak memory of an eager training step, {words.point(point)}: {'; '.join(said)}.")
                break
    return found


def crossings(speeds: Sequence[Speed]) -> list[str]:
    """Return a sentence for each family: from how many tokens on our fastest and upstream's fastest are faster than the ViT.

    A ViT without a class token has an even length, which attention kernels can like better. So models of clips, with a class
    token, and their blocks on tokens without one are compared each by itself, and the comparison that is less in our favour
    says so.
    """
    found = []
    with_class_token, without = curves.families(speeds), curves.families(speeds, clips=False)
    pairs = [(family, without) for family in with_class_token] + [(family, with_class_token) for family in without]
    for family, others in pairs:
        said = []
        for word, which in (("ours", _is_ours), ("ours, states kept,", _is_kept), ("upstream", _is_upstream)):
            if best := _longest(family, which):
                said.append(f"{word} {_meets(family, best)}")
        if said:
            how = {"graph": "CUDA graphs"}.get(family.main_way, family.main_way)
            is_better = any(ours_at(family) > ours_at(other) for other in others if same_models(other, family))
            better = " This is the better form of the ViT." * is_better
            found.append(f"- {family.title}, {how}: {'; '.join(said)}.{better}")
    return found


def _longest(family: Family, which: Callable[[Speed], bool]) -> Curve | None:
    """Return the curve of a kind that goes furthest in the family's main way, the fastest of these."""
    some = [c for c in family.of(MAMBA) if c.way == family.main_way and which(c.timed[-1])]
    return min(some, key=lambda c: (-c.timed[-1].point["L"], seconds(c.timed[-1])), default=None)


def same_models(one: Family, other: Family) -> bool:
    """Return whether two families differ in the class token alone."""
    own, others = ((f.race, dict(f.dims)["B"], f.mode, f.dtype, f.main_way) for f in (one, other))
    return own == others


def ours_at(family: Family) -> float:
    """Return from how many tokens on ours is faster than the ViT: 0 for all that were timed, infinity for none."""
    curve = _longest(family, _is_ours)
    m = meeting(family, curve) if curve else None
    if m is None or not m.lengths:
        return 0.0
    return m.at or (0.0 if m.ratios[-1] < 1 else math.inf)


def _meets(family: Family, curve: Curve) -> str:
    """Return in words where a curve meets the ViT."""
    m = meeting(family, curve)
    if m.at:
        return f"meets the ViT at **{tokens(m.at)} tokens**"
    return "meets it nowhere" + (f" from {m.lengths[0]:,} to {m.lengths[-1]:,} tokens" if m.lengths else "")


def _is_ours(s: Speed) -> bool:
    return s.entry.role == "ours" and not _is_kept(s)


def _is_kept(s: Speed) -> bool:
    return s.entry.implementation == grids.NATIVE_KEPT


def _is_upstream(s: Speed) -> bool:
    return s.entry.role == "rival" and s.entry.subject not in (VIT, *OTHER_MODELS)


def _is_vit(s: Speed) -> bool:
    return s.entry.subject == VIT


def _is_other(s: Speed) -> bool:
    return s.entry.subject in OTHER_MODELS


KINDS = (_is_ours, _is_kept, _is_upstream, _is_vit)


def kind_of(s: Speed) -> Callable[[Speed], bool]:
    """Return the first of `KINDS` that holds, or that it is another model: a ViT of ours does not exist."""
    return next((which for which in KINDS if which(s)), _is_other)


def _ours(best: Speed | None, at: Sequence[Speed]) -> str:
    """Return our fastest time in ms, or why there is none."""
    if best:
        return number(1e3 * seconds(best))
    return next((status(s) for s in at if _is_ours(s)), "-")


def _other(ours: Speed | None, other: Speed | None) -> str:
    """Return another's time in ms, and how many times ours it is."""
    if not other:
        return "-"
    times = f" ({seconds(other) / seconds(ours):.2f}x)" if ours else ""
    return Markdown(f"{number(1e3 * seconds(other))}{times}" + "*" * bool(fault_note(other)))
