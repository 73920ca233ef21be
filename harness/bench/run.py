"""A benchmark run: licences first, then ceilings, then every point, race by race."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from fnmatch import fnmatch

import torch

from harness.baselines import attention
from harness.bench import attentions, ceilings, grids, roofline
from harness.bench.interleave import interleave
from harness.bench.worker import Worker
from harness.judge import parity
from harness.judge.request import ParityRequest, require_known
from harness.records.ceilings import BoxCeilings
from harness.records.record import Record
from harness.records.speed import GPU_WAYS, Entry, Point, Speed
from harness.runs import workers
from harness.runs.store import Run

PARITY = ("forward", "backward")
ROOM_FOR_ALL = {"infer": 300_000, "train": 30_000}  # tokens, of all clips together, for which everyone has memory


def licence_requests(
    racing: Iterable[tuple[str, Entry]], device: str, dtype: str, threads: int
) -> list[ParityRequest]:
    """Return the requests to parity that license the entries of (race, entry) pairs before they are timed.

    There is a request for each subject, and one for each race with its own licence.
    """
    names: dict[tuple[str, str], dict[str, None]] = {}
    races, requests = grids.races(), []
    for race, entry in racing:
        licensed_race = race if races[race].licence else ""
        names.setdefault((licensed_race, entry.subject), {})[entry.implementation] = None
    for (race, subject), implementations in names.items():
        checks = (races[race].checks if race else ()) or PARITY
        cases = (races[race].licence if race else None) or roofline.timed(subject).licence
        requests.append(
            ParityRequest("full", device, (subject,), checks, tuple(implementations), (dtype,), cases(dtype), threads=threads)
        )
    return requests


def ask_licences(requests: list[ParityRequest], run: Run, tell: Callable[[str], None], jobs: int = 1) -> None:
    """Ask the questions that are not answered yet, in `jobs` processes; the records go into the run."""
    unanswered = [request for request in requests if parity.is_unanswered(request, run)]
    for request in unanswered:
        tell(f"licence: {request.subjects[0]}, {', '.join(request.checks)}")
    parity.run_parity(unanswered, run, lambda case, record: None, jobs=jobs)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def refusal(entry: Entry, point: Point, records: list[Record]) -> tuple[str, float]:
    """Return why an entry may not be timed at a point ("" if it may), and by how many budgets it is wrong at worst."""
    if entry.implementation == "reference":  # the others are held against it
        return "", 0.0
    mine = [r for r in records if (r.subject, r.implementation, r.dtype) == (entry.subject, entry.implementation, point.dtype)]
    checks = grids.race_of(point).checks or (PARITY if point.mode == "train" else PARITY[:1])
    mine = [r for r in mine if r.check in checks]
    worst = max((r.worst.ratio for r in mine if r.failed and r.worst), default=0.0)
    if failed := [r for r in mine if r.failed]:
        first = failed[0]
        detail = f"{first.worst.tensor} is wrong by {first.worst.ratio:.2g} budgets" if first.worst else first.reason
        return f"parity {first.check} failed in {first.case}: {detail}", worst
    if not any(r.status == "pass" for r in mine):
        return "parity asked it nothing in this precision", 0.0
    return "", 0.0


def time_points(
    run: Run, points: list[Point], entries_at: Callable[[Point], list[Entry]], best: BoxCeilings | None, budget: float,
    slowest: float, device: str, threads: int, tell: Callable[[Speed], None],
) -> None:  # fmt: skip
    """Time what the run has not timed yet. A point longer than one that ran out of memory or time is implied.

    Raises NoBound before anything is timed if a bound is wanted of a subject without one.
    """
    for subject in {e.subject for p in points for e in entries_at(p)} if best else ():
        roofline.timed(subject)
    workers_now: dict[Entry, Worker] = {}
    workers_next: dict[Entry, Worker] = {}  # of the next race
    races = list(dict.fromkeys(point.race for point in points))
    after = dict(zip(races, races[1:], strict=False))

    def left(point: Point) -> list[Entry]:
        known = {s.key for s in run.speeds}
        return [e for e in entries_at(point) if (e.name, point.name) not in known]

    racing = ""
    try:
        for point in points:
            if point.race != racing:
                _end(workers_now)  # every process holds some of the device's memory
                workers_now, workers_next, racing = workers_next, {}, point.race
                if device.startswith("cuda"):  # on a CPU that would take from what is timed
                    entries = dict.fromkeys(e for p in points if p.race == after.get(racing) for e in left(p))
                    allowed = max(slowest, grids.races()[after[racing]].slowest) if entries else slowest
                    workers_next = {entry: Worker(entry, device, threads, allowed) for entry in entries}
                    for worker in workers_next.values():
                        worker.start()  # and import, while others are timed
            wanted = left(point)
            for speed in _speeds(run, point, wanted, workers_now, budget, slowest, device, threads):
                if best:
                    speed = roofline.bounded(speed, best)
                run.add_speed(speed)
                tell(speed)
    finally:
        _end(workers_now)
        _end(workers_next)


def _end(of_entries: dict[Entry, Worker]) -> None:
    for worker in of_entries.values():
        worker.end()
    of_entries.clear()


def _speeds(
    run: Run,
    point: Point,
    wanted: list[Entry],
    of_entries: dict[Entry, Worker],
    budget: float,
    slowest: float,
    device: str,
    threads: int,
) -> Iterator[Speed]:
    racing, wrong = [], {}
    slowest = max(slowest, grids.race_of(point).slowest)
    for entry in wanted:
        why, budgets = refusal(entry, point, run.records)
        if why and entry.role == "ours":
            yield Speed(entry, point, "gated", reason=why)
        elif shorter := _ended(run, entry, point):
            yield Speed(entry, point, "implied", reason=f"{shorter.status} at {shorter.point.name} already")
        else:
            racing.append(of_entries.setdefault(entry, Worker(entry, device, threads, slowest)))
            wrong[entry] = why, budgets
    load_at_once, fewest = fits_together(run, [w.entry for w in racing], point), grids.race_of(point).fewest(point)
    for speed in interleave(racing, point, budget, load_at_once, fewest):
        why, budgets = wrong[speed.entry]
        yield replace(speed, wrong=budgets, reason=speed.reason or why)


def fits_together(run: Run, entries: list[Entry], point: Point) -> bool:
    """Return whether all entries fit into the memory at the same time.

    They do if tokens are few, or if the memory at a shorter point of the curve fits after growing with the tokens. An entry
    that grows faster, as naive attention does, is loaded a second time, alone.
    """
    if point.tokens <= ROOM_FOR_ALL[point.mode]:
        return True
    shorter = [s for s in run.speeds if s.reserved and s.point.curve == point.curve and s.point["L"] <= point["L"]]
    needs = {s.entry: s.reserved * point.tokens / s.point.tokens for s in sorted(shorter, key=lambda s: s.point["L"])}
    room = 0.9 * (run.about["box"].get("gpu_memory_gib") or 0) * 2**30  # every process needs some to be there
    return needs.keys() >= set(entries) and sum(needs[e] for e in entries) <= room


def _ended(run: Run, entry: Entry, point: Point) -> Speed | None:
    """Return the shorter point of the same curve at which the entry ran out of memory or time."""
    mine = (s for s in run.speeds if s.entry.name == entry.name and s.point.curve == point.curve)
    return next((s for s in mine if s.status in ("oom", "timeout") and s.point["L"] <= point["L"]), None)


def points_here(grid: str, device: str, races: tuple[str, ...], patterns: tuple[str, ...] = ()) -> list[Point]:
    """Return the points of a grid that this box can time, of these races or those timed by default, with a name like one of
    the patterns."""
    found = [p for p in grids.points(grid) if device.startswith("cuda") or p.way not in GPU_WAYS]
    chosen = grids.chosen_races(races)
    found = [p for p in found if p.race in chosen]
    return [p for p in found if not patterns or any(fnmatch(p.name, pattern) for pattern in patterns)]


def require_contenders(names: tuple[str, ...]) -> tuple[str, ...]:
    """Return the names of implementations that are to be timed, if all are contenders of a race. Raises UsageError."""
    racing = dict.fromkeys(subject for race in grids.races().values() for subject, _ in race.contenders)
    known = dict.fromkeys(i.name for s in racing for kernel in ("sdpa", None) for i in grids.contenders(s, kernel))
    require_known("implementation", names, known)
    return names


def anything_to_time(points: list[Point], grid: str, device: str, names: tuple[str, ...]) -> bool:
    """Return whether an entry can be timed at one of the points here, whichever attention is the fastest of this box."""
    for race in dict.fromkeys(p.race for p in points):
        for kernel in ("sdpa", *attention.PINNED):
            for entry in grids.entries(race, device, kernel, names):
                if any(grids.runs(entry, p, grid) for p in points if p.race == race):
                    return True
    return False


def why_nothing(points: list[Point], device: str, names: tuple[str, ...]) -> list[str]:
    """Return why none of the contenders at these points, or of those with these names, can be timed here."""
    absent = [a for a in grids.absent({p.race for p in points}, device) if not names or a["implementation"] in names]
    return [f"{a['implementation']}: {a['reason']}" for a in absent] or [f"{', '.join(names)} takes part at none of the points"]


def describe(
    grid: str, device: str, races: tuple[str, ...], names: tuple[str, ...], patterns: tuple[str, ...], budget: float, box: dict
) -> dict:  # fmt: skip
    """Return the description of a benchmark run for run.json, at its start."""
    plan = {"grid": grid, "device": device, "races": races, "names": names, "points": patterns, "budget": budget}
    absent = grids.absent(grids.chosen_races(races), device)
    return {"kind": "bench", "plan": plan, "box": box, "absent": absent}


def measure_box(run: Run, dtypes: Sequence[str], threads: int) -> None:
    """Measure ceilings in these dtypes, and attentions in the first, once a run.

    They are measured in a process of its own with as many threads as what is timed: their memory is not needed later.
    """
    if {"ceilings", "attention"} <= run.about.keys():
        return
    device = run.about["plan"]["device"]
    with workers.pool(1) as pool:
        run.about["ceilings"] = pool.submit(ceilings.measure, device, dtypes, threads).result().to_json()
        run.about["attention"] = pool.submit(attentions.measure_attentions, device, dtypes[0]).result()
    run.save()
