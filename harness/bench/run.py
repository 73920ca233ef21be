"""A sweep: licences first, then ceilings, then every point, race by race."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, replace
from fnmatch import fnmatch

import torch

from harness.bench import ceilings, grids, roofline
from harness.bench.ceilings import Ceilings
from harness.bench.interleave import race
from harness.bench.worker import Worker
from harness.judge import parity
from harness.judge.plan import Plan
from harness.records.record import Record
from harness.records.speed import Entry, Point, Speed
from harness.runs import workers
from harness.runs.store import Run

# The reduced cases that license a timing: the operator as it is called, the model in the precision in which it is timed.
LICENCES = {
    "scan": ("B2-L197-E384-N16-{0}", "B2-L197-E384-N16-reverse-{0}"),
    "scan_both": ("B2-L197-E384-N16-{0}",),
    "conv": ("B2-L197-E384-K4-{0}", "B2-L197-E384-K4-reverse-{0}"),
    "norm": ("B2-L9-D33-kind=rms-{0}", "B2-L1569-D576-kind=rms-{0}"),
    "mixer": ("B2-L197-D384-{1}{0}",),
    "videomamba": ("B2-T8-S64-D192-L129-{1}{0}",),
    "vit": ("B2-T*-{1}{0}",),
}
PARITY = ("forward", "backward")
ROOMY = {"infer": 300_000, "train": 30_000}  # tokens, of all clips together, that nobody needs much memory for
# Races that have a licence of their own: the checks, all asked for either mode, and their cases.
PIECEWISE = {
    "stream": (
        ("chunks", "stream"),
        (
            "B1-T4-S64-D192-L65-causal-state-readout=mean-stretch-video-{1}{0}",
            "B2-T4-S32-D32-L17-causal-state-readout=tokens-tubelet2-{1}{0}",  # every tubelet judged by itself
        ),
    ),
    # L129, and in bfloat16 L769, of whose chunks the time is cut
    "chunks": (("forward_chunked",), ("B[12]-T*-S[61]*-D192-L[17][26]9-{1}{0}",)),
}


def licence_plans(racing: Iterable[tuple[str, Entry]], device: str, dtype: str, threads: int) -> list[Plan]:
    """What parity asks of the entries of races before the clock starts: a plan a subject, and one for each race with a
    licence of its own."""
    names: dict[tuple[str, str], dict[str, None]] = {}
    for name, entry in racing:
        names.setdefault((name if name in PIECEWISE else "", entry.subject), {})[entry.implementation] = None
    cast, plans = "" if dtype == "float32" else "cast-", []
    for (name, subject), who in names.items():
        questions, cases = PIECEWISE.get(name, (PARITY, LICENCES[subject]))
        named = tuple(c.format(dtype, cast) for c in cases)
        plans.append(Plan("full", device, (subject,), questions, tuple(who), (dtype,), named, threads=threads))
    return plans


def licence(plans: list[Plan], run: Run, tell: Callable[[str], None], jobs: int = 1) -> None:
    """Ask what was not asked yet, in `jobs` processes; the records go into the run."""
    asked = [plan for plan in plans if parity.left(plan, run)]
    for plan in asked:
        tell(f"licence: {plan.subjects[0]}, {', '.join(plan.checks)}")
    parity.run_parity(asked, run, lambda case, record: None, jobs=jobs)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def judged(entry: Entry, point: Point, records: list[Record]) -> tuple[str, float]:
    """Why an entry may not be timed in a mode ("" if it may), and by how many budgets it is wrong at worst."""
    if entry.implementation == "reference":  # the others are held against it
        return "", 0.0
    mine = [r for r in records if (r.subject, r.implementation, r.dtype) == (entry.subject, entry.implementation, point.dtype)]
    questions, _ = PIECEWISE.get(point.race, (PARITY if point.mode == "train" else PARITY[:1], ()))
    mine = [r for r in mine if r.check in questions]
    worst = max((r.worst.ratio for r in mine if r.failed and r.worst), default=0.0)
    if failed := [r for r in mine if r.failed]:
        first = failed[0]
        detail = f"{first.worst.tensor} is wrong by {first.worst.ratio:.2g} budgets" if first.worst else first.reason
        return f"parity {first.check} failed in {first.case}: {detail}", worst
    if not any(r.status == "pass" for r in mine):
        return "parity asked it nothing in this precision", 0.0
    return "", 0.0


def sweep(
    run: Run, points: list[Point], who: Callable[[Point], list[Entry]], best: Ceilings | None, budget: float, slowest: float,
    device: str, threads: int, tell: Callable[[Speed], None],
) -> None:  # fmt: skip
    """Time what the run has not timed yet. A point longer than one that ran out of memory or time is implied."""
    staff: dict[Entry, Worker] = {}
    coming: dict[Entry, Worker] = {}  # those of the next race
    races = list(dict.fromkeys(point.race for point in points))
    after = dict(zip(races, races[1:], strict=False))

    def left(point: Point) -> list[Entry]:
        known = {s.key for s in run.speeds}
        return [e for e in who(point) if (e.name, point.name) not in known]

    racing = ""
    try:
        for point in points:
            if point.race != racing:
                _dismiss(staff)  # every process holds some of the device's memory
                staff, coming, racing = coming, {}, point.race
                if device.startswith("cuda"):  # on a CPU that would take from what is timed
                    entries = dict.fromkeys(e for p in points if p.race == after.get(racing) for e in left(p))
                    coming = {entry: Worker(entry, device, threads, slowest) for entry in entries}
                    for worker in coming.values():
                        worker.start()  # and import, while others are timed
            wanted = left(point)
            for speed in _speeds(run, point, wanted, staff, budget, slowest, device, threads):
                if best:
                    speed = replace(speed, bound=roofline.bound(point, speed.entry.subject, speed.entry.variant, best))
                run.add_speed(speed)
                tell(speed)
    finally:
        _dismiss(staff)
        _dismiss(coming)


def _dismiss(staff: dict[Entry, Worker]) -> None:
    for worker in staff.values():
        worker.end()
    staff.clear()


def _speeds(
    run: Run,
    point: Point,
    wanted: list[Entry],
    staff: dict[Entry, Worker],
    budget: float,
    slowest: float,
    device: str,
    threads: int,
) -> Iterator[Speed]:
    racing, wrong = [], {}
    for entry in wanted:
        why, budgets = judged(entry, point, run.records)
        if why and entry.role == "ours":
            yield Speed(entry, point, "gated", reason=why)
        elif shorter := _ended(run, entry, point):
            yield Speed(entry, point, "implied", reason=f"{shorter.status} at {shorter.point.name} already")
        else:
            racing.append(staff.setdefault(entry, Worker(entry, device, threads, slowest)))
            wrong[entry] = why, budgets
    for speed in race(racing, point, budget, roomy(run, [w.entry for w in racing], point)):
        why, budgets = wrong[speed.entry]
        yield replace(speed, wrong=budgets, reason=speed.reason or why)


def roomy(run: Run, entries: list[Entry], point: Point) -> bool:
    """Whether nobody's loading will meet another's end: tokens are few, or what all took at a shorter point of the curve fits
    after growing with the tokens. What grows faster, as naive attention does, is then loaded a second time, alone."""
    if point.tokens <= ROOMY[point.mode]:
        return True
    shorter = [s for s in run.speeds if s.reserved and s.point.line == point.line and s.point["L"] <= point["L"]]
    needs = {s.entry: s.reserved * point.tokens / s.point.tokens for s in sorted(shorter, key=lambda s: s.point["L"])}
    room = 0.9 * (run.about["box"].get("gpu_memory_gib") or 0) * 2**30  # every process needs some to be there
    return needs.keys() >= set(entries) and sum(needs[e] for e in entries) <= room


def _ended(run: Run, entry: Entry, point: Point) -> Speed | None:
    """The shorter point of the same curve at which the entry ran out of memory or time."""
    mine = (s for s in run.speeds if s.entry.name == entry.name and s.point.line == point.line)
    return next((s for s in mine if s.status in ("oom", "timeout") and s.point["L"] <= point["L"]), None)


def points_here(grid: str, device: str, races: tuple[str, ...], patterns: tuple[str, ...] = ()) -> list[Point]:
    """Points of a grid that this box can time, of these races and with a name like one of the patterns."""
    here = [p for p in grids.points(grid) if device.startswith("cuda") or p.way not in ("graph", "compiled")]
    here = [p for p in here if not races or p.race in races]
    return [p for p in here if not patterns or any(fnmatch(p.name, pattern) for pattern in patterns)]


def about(
    grid: str, device: str, races: tuple[str, ...], names: tuple[str, ...], patterns: tuple[str, ...], budget: float, box: dict
) -> dict:  # fmt: skip
    """What run.json says of a sweep at its start."""
    plan = {"grid": grid, "device": device, "races": races, "names": names, "points": patterns, "budget": budget}
    absent = grids.absent(races or grids.RACES, device)
    return {"kind": "bench", "plan": plan, "box": box, "absent": absent}


def measure_box(run: Run, dtype: str) -> None:
    """Ceilings and attentions of this box, once a run, in a process of its own: it needs the memory of none of them later."""
    if {"ceilings", "attention"} <= run.about.keys():
        return
    device = run.about["plan"]["device"]
    with workers.pool(1) as pool:
        run.about["ceilings"] = asdict(pool.submit(ceilings.measure, device, dtype).result())
        run.about["attention"] = pool.submit(grids.attentions, device, dtype).result()
    run.save()
