"""A benchmark run on half a page, as in the README: our fastest, upstream's fastest and the fastest ViT."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from harness.bench import grids
from harness.records.speed import MODES, Speed
from harness.report.curves import MAMBA, VIT, Curve, Family, fault_note, meeting, memory, seconds
from harness.report.markdown import Markdown, table
from harness.report.speed_figures import sizes, tokens
from harness.report.speed_tables import fastest, number, status

OTHER_MODELS = ("qwen2", "resamplers")  # subjects beside ours in its race that are neither upstream's way nor a ViT
HEAD = ["", "forward", "upstream", "ViT", "roofline", "forward + backward", "kept", "upstream", "ViT", "roofline"]


def overview(speeds: Sequence[Speed]) -> str:
    """Return one table, a row for each size of an operator or model; models from CUDA graphs where they were timed so."""
    operators, models = grids.races("operators"), grids.races("models")
    ways = {s.point.way for s in speeds if s.point.race in models}
    rows: dict[tuple[Any, ...], list[Speed]] = {}
    for s in speeds:
        p = s.point
        chosen = "graph" if "graph" in ways else "eager"
        if p.race in operators or (p.race in models and p.way == chosen):
            rows.setdefault((p.race, p.dims, p.way, p.dtype), []).append(s)
    fastest_of = [fastest(filter(which, speeds)) for which in KINDS]
    lines = []
    for mine in rows.values():
        cells = [sizes(mine[0].point)]
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
    how = "replayed from CUDA graphs" if "graph" in ways else "run eagerly"
    return (
        f"Medians in ms, and how many times ours a rival's is; `*`: its error was more than a tenth over its budget.\n"
        f"All models are {how}. "
        '"Kept" is ours by backend `native_kept`, whose mixers keep in memory what `native` scans again for.\n\n'
        + table(HEAD, lines)
    )


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
                said = [f"{s.entry.name} {number((memory(s) or 0) / 2**30)} GiB" for s in least]
                found.append(f"- Peak memory of an eager training step, {sizes(point)}: {', '.join(said)}.")
                break
    return found


def crossings(families: Iterable[Family]) -> list[str]:
    """Return a sentence for each family: from how many tokens on our fastest and upstream's fastest are faster than the ViT."""
    found = []
    for family in families:
        way = "graph" if "graph" in family.ways else "eager"
        curves = [c for c in family.of(MAMBA) if c.way == way]
        said = []
        for word, which in (("ours", _is_ours), ("ours, the scan kept,", _is_kept), ("upstream", _is_upstream)):
            some = [c for c in curves if which(c.timed[-1])]
            if some:
                best = min(some, key=lambda c: (-c.timed[-1].point["L"], seconds(c.timed[-1])))
                said.append(f"{word} {_meets(family, best)}")
        if said:
            found.append(f"- {family.title} ({way}): {'; '.join(said)}.")
    return found


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
