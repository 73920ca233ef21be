"""The page of a benchmark run: what was found, one chart, then how fast, how right, how measured."""

from pathlib import Path

from harness.bench import grids
from harness.records.record import Record
from harness.records.speed import Speed, is_failure
from harness.report import (
    chunking,
    curves,
    faults,
    frame_curves,
    glossary,
    headlines,
    html,
    loop,
    measurement,
    overview,
    paper,
    reading,
    speed_figures,
    speed_tables,
    streaming,
    tables,
    words,
)  # fmt: skip
from harness.report.figures import Drawing, shown
from harness.report.html import Page, Section
from harness.report.markdown import Markdown, bold, code, escape, table
from harness.report.parity import again, box
from harness.runs import environment
from harness.runs.store import Run

UNTIMED = (
    ("gated", "Not timed, because parity failed:"), ("error", "Failed while being timed:"), ("timeout", "Out of time:"),
)  # fmt: skip
CPU = "This is the CPU grid: it shows that the bench works; its numbers say nothing of a GPU."


def write(run: Run) -> Path:
    """Write report.md, its figures and report.html into the run's folder; return the path of report.md."""
    plan, here = run.about.get("plan", {}), run.about.get("box", {})
    where = (here.get("gpu") if measurement.on_gpu(run) else "") or here.get("cpu") or "?"
    title = f"Bench on {where}, grid {plan.get('grid', '?')}, {str(run.about.get('started', '?'))[:10]}"
    speeds, folder = faults.marked(run), run.folder
    families = curves.families(speeds)
    times, held, derived = _figures(run, speeds, families)
    pairs = paper.pairs(speeds)
    asked = [r for r in run.records if r.status != "skip"]
    sections = [
        *([Section("How fast", fast)] if (fast := "\n\n".join([*_overview(speeds), shown(times[1:])])) else []),
        *([Section("Loops, the host's time included", loop.section(speeds))] if _has(speeds, loop.RACE) else []),
        *([Section("Streams and chunks", "\n\n".join(split))] if (split := split_videos(speeds)) else []),
        *([Section("Video files", _data(run, speeds))] if _has(speeds, reading.RACE) else []),
        *([Section("How much memory", memory)] if (memory := _memory(speeds, held)) else []),
        Section("How right", _parity(run)),
        Section("How it was measured", measurement.measured(run), folded=True),
        Section("What failed or was not timed", _missing(run, speeds)),
        *([Section("Derived figures, and other ways to run", shown(derived), folded=True)] if derived else []),
        *([Section("Where every VideoMamba meets the ViT", _meetings(families), folded=True)] if families else []),
        *([Section("The paper's comparison, redone", paper.factors(pairs), folded=True)] if pairs else []),
        *([Section("Operators, all times", "\n\n".join(tables_), folded=True)] if (tables_ := _operators(speeds)) else []),
        *([Section("Models, all times", "\n\n".join(tables_), folded=True)] if (tables_ := _models(speeds)) else []),
        *([Section("Parity, all answers", _answers(asked), folded=True)] if asked else []),
        Section("Ceilings of this box", measurement.ceilings(run), folded=True),
        Section("The box", box(run), folded=True),
        Section("How to repeat it", again(run)),
        Section("Glossary", glossary.terms(), folded=True),
    ]  # fmt: skip
    large = headlines.numbers(speeds, families)
    said = "\n\n".join([verdict(run), *_warnings(run)])
    return html.write(folder, Page(title, said, large, shown(times[:1]) or "Nothing to draw.", sections))


def _overview(speeds: list[Speed]) -> list[str]:
    """Return the tables of operators and models, and where these meet the ViT; nothing where none was timed."""
    timed = {s.point.race for s in speeds} & {*grids.races("operators"), *grids.races("models")}
    beside = [race for race in overview.raced_with_others() if race in timed]
    parts = [overview.beside_others([s for s in speeds if s.point.race == race]) for race in beside]
    usual = [overview.overview(speeds), "\n".join(overview.crossings(speeds))]
    return [*filter(None, usual if timed - {*beside} else []), *parts]


def _memory(speeds: list[Speed], drawn: list[Drawing]) -> str:
    """Return the peak memory of models as sentences and figures, and where other models run beside ours as tables."""
    parts = ["\n".join(overview.most_memory(speeds)), shown(drawn)]
    for race in overview.raced_with_others():
        if mine := [s for s in speeds if s.point.race == race and s.seconds]:
            parts += ["Peak memory of a call in GiB:", overview.memory_beside_others(mine)]
    return "\n\n".join(filter(None, parts))


def _has(speeds: list[Speed], race: str) -> bool:
    return any(s.point.race == race for s in speeds)


def verdict(run: Run) -> str:
    """Return the verdict in a sentence or two: what was found, then how many points of ours failed or have no time."""
    speeds = faults.marked(run)
    ours = [s for s in speeds if s.entry.role == "ours"]
    timed, failed = sum(s.status == "ok" for s in ours), sum(map(is_failure, ours))
    said = [headlines.sentence(speeds, curves.families(speeds)) if timed else "Nothing of ours was timed."]
    if failed:
        said.append(f"{failed} of {len(ours)} points of ours failed.")
    elif timed < len(ours):
        said.append(f"{len(ours) - timed} of {len(ours)} points of ours had no room in memory.")
    if (status := run.about.get("status")) != "finished":
        said.append(f"So far: the run is {escape(status)}.")
    return " ".join(filter(None, said)) or f"{timed} points of ours were timed."


def _warnings(run: Run) -> list[str]:
    """Return the limits of the numbers, a paragraph each."""
    plan, said = run.about.get("plan", {}), []
    if run.about.get("status") == "interrupted":
        said.append("> **Interrupted.** Points are missing; nothing below is the whole answer.")
    elif run.about.get("status") != "finished":
        said.append(f"> **Not finished** (status: {escape(run.about.get('status'))}). Points are missing.")
    narrowed = [escape(f"{what} {', '.join(plan[k])}") for k, what in (("races", "races"), ("names", "only")) if plan.get(k)]
    if points := plan.get("points"):
        several = f"points of {len(points)} patterns, listed in [the box](#the-box)"
        narrowed.append(Markdown(f"points {code(points[0])}" if len(points) == 1 else several))
    if narrowed:
        said.append(f"> **A part of the points** ({'; '.join(narrowed)}). It compares those that were timed, and no others.")
    if not measurement.on_gpu(run) and not (run.speeds and all(s.point.race == reading.RACE for s in run.speeds)):
        said.append(f"> **On a CPU.** {CPU}")
    return said


def _missing(run: Run, speeds: list[Speed]) -> str:
    """Return what has no time, and whose times have a mark, with the reasons."""
    said = []
    for status, head in UNTIMED:
        if lines := speed_tables.missing(speeds, status):
            said.append("\n".join([head, "", *(f"- {line}" for line in lines)]))
    if lines := _wrong(speeds):
        said.append("\n".join(["Timed, with errors that are more than a tenth over their budget, or not judged:", "", *lines]))
    if absent := run.about.get("absent", []):
        whose = [f"{escape(a['subject'])}: {bold(a['implementation'])}" + " (rival)" * (a["role"] == "rival") for a in absent]
        lines = [f"- {name}: {escape(a['reason'])}" for name, a in zip(whose, absent, strict=True)]
        said.append("\n".join(["Not on this machine:", "", *lines]))
    lost = [s for s in speeds if s.status in ("oom", "implied")]
    if lost:
        names = dict.fromkeys(speed_tables.entry_name(s.entry) for s in lost)
        said.append(f"Out of memory, or not tried after that: {len(lost)} points of {escape(', '.join(names))}.")
    return "\n\n".join(said) or "Nothing: every entry was timed at every point."


def _wrong(speeds: list[Speed]) -> list[str]:
    """Return a line for each entry whose times have a mark."""
    wrong = [s for s in speeds if s.seconds and curves.fault_note(s)]
    found = {escape(speed_tables.entry_name(s.entry)): escape(curves.fault_note(s)) for s in wrong}
    return [f"- {name}: {fault}" for name, fault in found.items()]


def _parity(run: Run) -> str:
    """Return in words what parity found in this run, for each implementation, then the failures of ours."""
    rows = []
    for name, role in dict.fromkeys((r.implementation, r.role) for r in run.records if r.status != "skip"):
        mine = [r for r in run.records if r.implementation == name and r.status != "skip"]
        passed = sum(r.status == "pass" for r in mine)
        who = words.implementation(name, mine[0].subject, role)
        rows.append([who, f"{passed} of {len(mine)}", faults.in_words(mine) or "-"])
    if not rows:
        return "No question was asked in this run."
    said = "Before it is timed, every entry answers questions of parity, on smaller sizes, in this same run:"
    parts = [said, table(["implementation", "passed", "failures by kind"], rows)]
    if any(r.failed and r.role == "ours" for r in run.records):
        parts += ["### What failed", tables.failures([r for r in run.records if r.role == "ours"])]
    return "\n\n".join(parts)


def _answers(records: list[Record]) -> str:
    """Return a table of checks and implementations for each subject, and the failures of rivals."""
    subjects = dict.fromkeys(r.subject for r in records)
    parts = [f"### {escape(s)}\n\n{tables.matrix([r for r in records if r.subject == s])}" for s in subjects]
    return "\n\n".join([*parts, "### Failures of rivals", tables.failures(r for r in records if r.role == "rival")])


def _meetings(families: list[curves.Family]) -> str:
    """Return, for each family of models, where VideoMamba meets the ViT."""
    return "\n\n".join(f"{f.title}:\n\n{speed_tables.meetings(f)}" for f in families)


def _figures(
    run: Run, speeds: list[Speed], families: list[curves.Family]
) -> tuple[list[Drawing], list[Drawing], list[Drawing]]:
    """Draw all figures; return those of times, the main one first, those of memory, and those that are folded."""
    kind, folder = "allocated" if measurement.on_gpu(run) else "resident", run.folder
    main = headlines.main_family(families)
    times, held, folded = [], [], []
    for family in sorted(families, key=lambda f: f is not main):
        (time, memory), rest = speed_figures.models(family, folder, kind)
        times.append(time)
        held.append(memory)
        folded += rest
    for draw in (loop.draw, streaming.draw, chunking.draw, reading.draw, speed_figures.operators, frame_curves.draw):
        for drawing in draw(speeds, folder):
            (held if drawing.path.stem.endswith("-memory") else times).append(drawing)
    return times, held, folded + paper.draw(paper.pairs(speeds), folder)


def _operators(speeds: list[Speed]) -> list[str]:
    """Return a table for each race of operators and dtype."""
    groups: dict[str, list[Speed]] = {}
    races = grids.races("operators")
    for s in speeds:
        if s.point.race in races:
            groups.setdefault(f"{s.point.race}, {s.point.dtype}", []).append(s)
    return [f"### {title}\n\n{speed_tables.operators(mine)}" for title, mine in groups.items()]


def _models(speeds: list[Speed]) -> list[str]:
    """Return a table for each race of models, mode and dtype."""
    groups: dict[str, list[Speed]] = {}
    races = grids.races("models")
    for s in speeds:
        if s.point.race in races:
            where = f"{curves.race_title(s.point.race)}, {words.MODES[s.point.mode]}, {s.point.dtype}"
            groups.setdefault(where, []).append(s)
    return [f"### {title}\n\n{speed_tables.models(mine)}" for title, mine in groups.items()]


def split_videos(speeds: list[Speed]) -> list[str]:
    """Return a section with a table for each race of videos that come frame by frame or in chunks."""
    parts = []
    for race, head, made in (
        (streaming.RACE, "A causal model, frame by frame", streaming.frames),
        (chunking.RACE, "A bidirectional model, in chunks", chunking.passes),
    ):
        if mine := [s for s in speeds if s.point.race == race]:
            parts.append(f"### {head}\n\n{made(mine)}")
    return parts


def _data(run: Run, speeds: list[Speed]) -> str:
    """Return how fast videos are read."""
    mine = [s for s in speeds if s.point.race == reading.RACE]
    return reading.section(
        mine, reading.trained([run, *reading.accepted_runs(environment.ROOT / "reports" / "accepted")], mine)
    )
