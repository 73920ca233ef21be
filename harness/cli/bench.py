"""`python -m harness bench`."""

import sys
from pathlib import Path
from typing import Annotated

import torch
import typer

from harness.bench import benchmark_json, grids
from harness.bench import run as bench_run
from harness.cli.options import Device, Names, Out, Resume
from harness.judge.request import default_device, require_device, require_known
from harness.records.ceilings import BoxCeilings
from harness.records.speed import Entry, Point, Speed, is_failure, last_line
from harness.report import bench as page
from harness.runs import environment, workers
from harness.runs.conclude import FAILED, INTERRUPTED, NOTHING, PASSED, conclude, nothing_ran
from harness.runs.progress import Progress
from harness.runs.store import Run, begin, require_writable, unfinished

BUDGET = {"cpu": 1.5, "full": 0.4, "long": 4.0}  # seconds of samples an entry and point
SLOWEST = {"cpu": 10.0, "full": 2.0, "long": 10.0}  # seconds of a call; what takes longer is not timed


def bench(
    grid: Annotated[str, typer.Option(help="cpu, full or long; by default cpu without a GPU, else full")] = "",
    race: Annotated[
        Names, typer.Option(help=f"{', '.join(grids.races())}; by default {', '.join(grids.chosen_races(()))}")
    ] = None,
    impl: Annotated[Names, typer.Option(help="implementation (`list` names them); all by default")] = None,
    point: Annotated[Names, typer.Option(help="name of a point, shell patterns allowed (--dry-run lists them)")] = None,
    budget: Annotated[float, typer.Option(min=0.0, help="seconds of samples an entry and point; 0 takes the grid's")] = 0.0,
    device: Device = "",
    out: Out = None,
    resume: Resume = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="list the points, and who is timed at each")] = False,
) -> None:
    """Time everything that passes parity.

    Exits 0 if all of ours was timed or ran out of memory, 1 if a point of ours failed, ran out of time or is gated, which means
    that it did not pass parity in this run, 3 if nothing was timed. The points of ours that have no time are named at the end,
    with the reason. Where the options leave nothing that can be timed here, no folder is made.
    """
    if out or not dry_run:
        require_writable(out)
    device = require_device(device or default_device())
    grid = grid or ("full" if device.startswith("cuda") else "cpu")
    require_known("grid", [grid], grids.GRIDS)
    require_known("race", race or [], grids.races())
    points = bench_run.points_here(grid, device, tuple(race or ()), tuple(point or ()))
    wanted = bench_run.require_contenders(tuple(impl or ()))
    if not points:
        why = f"grid {grid} has no such point on {device}; `bench --grid {grid} --dry-run` lists them"
        raise typer.Exit(nothing_ran([why]))
    if dry_run:
        for p in points:
            who = [e for e in grids.entries(p.race, device, "sdpa", wanted) if grids.runs(e, p, grid)]
            print(f"{p.name:60} {p.tokens:8} tokens  {', '.join(e.name for e in who)}")
        return
    earlier = unfinished(out, "bench") if resume else None
    if not earlier and not bench_run.anything_to_time(points, grid, device, wanted):
        raise typer.Exit(nothing_ran(bench_run.why_nothing(points, device, wanted)))
    box = environment.describe(device)
    about = bench_run.describe(grid, device, tuple(race or ()), wanted, tuple(point or ()), budget or BUDGET[grid], box)
    run = begin(about, sys.argv[1:], out, earlier)
    print(f"{len(points)} points of grid {grid} on {box['gpu'] or box['cpu']}, into {run.folder}", flush=True)
    progress = Progress({})
    done = conclude(run, progress, lambda: _work(run, points, wanted, progress), write)
    print(*untimed(run), last_line(run.speeds), sep="\n")
    if not done:
        raise typer.Exit(INTERRUPTED)
    raise typer.Exit(exit_code(run))


def write(run: Run) -> Path:
    """Write the report and, in the same folder, the speeds in the format of pytest-benchmark; return the report's path."""
    benchmark_json.write(run)
    return page.write(run)


def exit_code(run: Run) -> int:
    """Return 1 if a point of ours was refused a time or failed, 3 if nothing was timed, else 0: out of memory is a result."""
    if any(is_failure(s) for s in run.speeds):
        return FAILED
    return PASSED if any(s.status == "ok" for s in run.speeds) else NOTHING


def untimed(run: Run) -> list[str]:
    """Return a line for each failure of ours and its reason, with the points."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for s in run.speeds:
        if is_failure(s):
            found.setdefault((s.status.upper(), s.entry.name, s.reason), []).append(s.point.name)
    return [f"{status} (ours) {name}: {reason}\n    at {', '.join(names)}" for (status, name, reason), names in found.items()]


def _work(run: Run, points: list[Point], wanted: tuple[str, ...], progress: Progress) -> None:
    """Measure the box, ask for licences, then time what the run has not timed yet."""
    plan, threads = run.about["plan"], torch.get_num_threads()
    progress.say("ceilings of this box, and its fastest attention")
    bench_run.measure_box(run, tuple(dict.fromkeys(p.dtype for p in points)), threads)
    fastest = min(run.about["attention"], key=run.about["attention"].get)
    races = {p.race: grids.entries(p.race, plan["device"], fastest, wanted) for p in points}
    entries = {p.name: [e for e in races[p.race] if grids.runs(e, p, plan["grid"])] for p in points}
    known = {s.key for s in run.speeds}
    environment.prepare()
    for dtype in dict.fromkeys(p.dtype for p in points):
        racing = [(p.race, e) for p in points if p.dtype == dtype for e in entries[p.name]]
        jobs = workers.processes_for(plan["device"]) if plan["device"].startswith("cuda") else 1
        each = max(1, threads // jobs)  # 16 threads in each of 12 processes took three times as long as one process
        bench_run.ask_licences(bench_run.licence_requests(racing, plan["device"], dtype, each), run, progress.say, jobs)

    progress.expect({_item(e, p): _cost(e, p) for p in points for e in entries[p.name] if (e.name, p.name) not in known})

    def tell(speed: Speed) -> None:
        result = f"{1e3 * speed.median.middle:.3g} ms" if speed.seconds else f"{speed.status}: {speed.reason}"
        progress.done(_item(speed.entry, speed.point), f"{speed.point.name} {speed.entry.name} {result}")

    ceilings, slowest = BoxCeilings.from_json(run.about["ceilings"]), SLOWEST[plan["grid"]]
    budget, device = plan["budget"], plan["device"]
    bench_run.time_points(run, points, lambda p: entries[p.name], ceilings, budget, slowest, device, threads, tell)


def _cost(entry: Entry, point: Point) -> float:
    """Return an entry's cost at a point, of an operator 1: models are built, long ones are slow, and compiling takes long."""
    if not entry.variant:
        return 1.0
    return (3.0 + point.tokens / 10_000) * (8.0 if point.way in ("compiled", "reduce-overhead") else 1.0)


def _item(entry: Entry, point: Point) -> str:
    """Return the name of an entry at a point in the progress."""
    return f"{entry.name} {point.name}"
