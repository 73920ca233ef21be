"""The page of a benchmark run: the licences, then the speeds, then how they were measured."""

import textwrap
from pathlib import Path
from typing import Any

from harness.bench import grids
from harness.bench.interleave import FEWEST, GOAL, MOST
from harness.bench.worker import WARM
from harness.records.ceilings import BoxCeilings
from harness.records.interval import RESAMPLES
from harness.records.speed import MODES, WAYS, Speed, is_failure, last_line
from harness.report import chunking, curves, loop, paper, reading, speed_figures, speed_tables, streaming, tables
from harness.report.html import write_both
from harness.report.markdown import bold, escape, table
from harness.report.page import again, box
from harness.runs import environment
from harness.runs.store import Run

UNTIMED = (
    ("gated", "GATED. Parity failed, so these have no speed:"), ("error", "FAILED while being timed:"),
    ("timeout", "OUT OF TIME while being timed:"),
)  # fmt: skip
OLD_DTYPE = "the points' dtype"  # which older runs did not name
CPU = "This is the CPU grid: it shows that the bench works; its numbers say nothing of a GPU."
HOW = f"""\
Every entry (an implementation of a subject) runs in a process of its own, so that what kills it costs nobody else. At each
point the entries take turns, a turn being an eighth of the budget or less, so that a drift of the clock meets all alike;
where they do not fit into the memory together each is timed alone, and its row says so. Each loads its call, runs it {WARM}
times (once if that takes a second; kept apart, not counted) and once more for its memory; sampling then stops when half the
width of the median's 95 % interval is within {100 * GOAL:.0f} % of the median ({FEWEST} samples at least), at {MOST}
samples, or when its budget of {{budget}} s is spent: {{settled}}. The interval is the middle 95 % of the medians of
{RESAMPLES} bootstrap resamples, seeded, so that the same samples give the same interval (of fewer than three samples, `n =
1` or 2, it is but their range). It holds the scatter within this run on this box, and no other doubt. Operators are timed
on inputs that are not in the cache (sets of random tensors take turns){{operators}}. Models are timed end to end, launches
included, on clips that lie on the device already. {{memory}} No clock was locked; every raw sample is in speeds.jsonl."""
GPU_OPERATORS = ", by the device's own clock with the launches queued ahead, so that the host's time does not count"
GPU_MEMORY = """Memory is the peak that PyTorch's allocator held during one call: weights, gradients and
scratch, and inputs, of an operator all the sets that take turns. A replayed graph allocates nothing, so that
its peak is that of its capture."""
CPU_MEMORY = "Memory is the most that the process held resident during one call, PyTorch itself included."
READ = """\
A figure of an entry of ours exists only if parity passed in this run: `GATED` is what failed, and has no speed. A rival that
failed is timed, with "wrong by N budgets" beside its figure and wherever that figure is used; a budget is what its error may
be. `[low, high]` is the 95 % interval of the median; two entries whose intervals overlap are not told apart. Time over
another's is below 1 where the row is faster. `out of memory` is the entry's own doing; longer points of the same curve are
`not tried`. The share of the roofline is the least time that this box needs for the point, by the ceilings above, over the
time taken: 100 % cannot be beaten. What was faster shows that a ceiling was measured too low, or holds for DRAM and not for a
cache: it has `no bound`, with the reason, and no share. Where curves meet is read off straight lines in
logarithms between neighbouring points, against the fastest ViT of the same way; it is as good as the points are close. Every
sample of a stream is the next frame, CLS's not among them: its median and 99th percentile are of what a caller waits. On a GPU
the memory of a stream is the peak of its capture and what the frames before have left. Chunks are held against the pass over
the whole video, in training one that runs every mixer again in the backward."""


def write(run: Run) -> Path:
    """Write report.md, its figures and report.html into the run's folder; return the path of report.md."""
    plan, here = run.about.get("plan", {}), run.about.get("box", {})
    title = f"Bench: grid {plan.get('grid', '?')} on {(here.get('gpu') if _gpu(run) else '') or here.get('cpu') or '?'}"
    families = curves.families(run.speeds)
    parts = [
        f"# {escape(title)}",
        _verdict(run),
        *_warnings(run),
        "## Licences: parity in this run", *_licences(run),
        "## Where VideoMamba meets the ViT", *_meetings(families),
        "## Plots", *_plots(run, families),
        "## Operators", *_operators(run.speeds),
        "## Models", *_models(run.speeds),
        *_loops(run),
        "## Streams and chunks", *split_videos(run.speeds),
        *_data(run),
        "## Ceilings of this box, measured in this run", _ceilings(run),
        "## How it was measured", _how(run),
        "## How to read this", READ,
        "\n".join(f"- `{word}`: {what}" for word, what in (MODES | WAYS).items()),
        "## The box", box(run),
        "## Again", again(run),
    ]  # fmt: skip
    return write_both(run.folder, "\n\n".join(parts) + "\n", title)


def _gpu(run: Run) -> bool:
    """Return whether a run was on a GPU."""
    return str(run.about.get("plan", {}).get("device", "")).startswith("cuda")


def _verdict(run: Run) -> str:
    """Return the verdict in bold, with counts."""
    ours = [s for s in run.speeds if s.entry.role == "ours"]
    timed, gated = (sum(s.status == status for s in ours) for status in ("ok", "gated"))
    failed = sum(map(is_failure, ours)) - gated
    lost = len(ours) - timed - gated - failed
    word = "GATED OR FAILED" if gated + failed else "TIMED" if timed else "NOTHING OF OURS WAS TIMED"
    word += f" SO FAR ({run.about.get('status')})" * (run.about.get("status") != "finished")
    said = f"ours: {timed} timed, {gated} gated, {failed} failed, {lost} out of memory or not tried"
    return f"**{word}.** {said}\n\n`{last_line(run.speeds)}`"


def _warnings(run: Run) -> list[str]:
    """Return the limits of the numbers, a paragraph each."""
    plan, said = run.about.get("plan", {}), []
    if run.about.get("status") == "interrupted":
        said.append("> **INTERRUPTED.** Points are missing; nothing below is the whole answer.")
    elif run.about.get("status") != "finished":
        said.append(f"> **NOT FINISHED** (status: {escape(run.about.get('status'))}). Points are missing.")
    if narrowed := [
        escape(f"{what} {', '.join(plan[k])}")
        for k, what in (("races", "races"), ("names", "only"), ("points", "points"))
        if plan.get(k)
    ]:
        said.append(f"> **FILTERED** ({'; '.join(narrowed)}). Others were not timed: nobody here is the fastest of all.")
    if not _gpu(run) and not (run.speeds and all(s.point.race == reading.RACE for s in run.speeds)):
        said.append(f"> **ON A CPU.** {CPU}")
    for status, head in UNTIMED:
        if lines := speed_tables.missing(run.speeds, status):
            said.append("\n".join([f"> **{head}**", ">", *(f"> - {line}" for line in lines)]))
    if lines := _wrong(run.speeds):
        said.append("\n".join(["> **WRONG RIVALS.** Timed, but their answers failed parity:", ">", *lines]))
    if absent := run.about.get("absent", []):
        whose = [f"{escape(a['subject'])}: {bold(a['implementation'])}" + " (rival)" * (a["role"] == "rival") for a in absent]
        lines = [f"> - {name}: {escape(a['reason'])}" for name, a in zip(whose, absent, strict=True)]
        said.append("\n".join(["> **NOT RUN HERE.** These were not timed at all:", ">", *lines]))
    return ["## Before the numbers", *(said or ["Nothing is missing: everybody was timed, unfiltered, to the end."])]


def _wrong(speeds: list[Speed]) -> list[str]:
    """Return a line for each entry that was timed although its answers failed parity."""
    wrong = [s for s in speeds if s.seconds and curves.fault_note(s)]
    found = {escape(speed_tables.entry_name(s.entry)): escape(curves.fault_note(s)) for s in wrong}
    return [f"> - {name}: {fault}" for name, fault in found.items()]


def _licences(run: Run) -> list[str]:
    """Return a table of checks and implementations for each subject, then the failures."""
    subjects = dict.fromkeys(r.subject for r in run.records)
    parts = [f"### {escape(s)}\n\n{tables.matrix([r for r in run.records if r.subject == s])}" for s in subjects]
    if any(r.failed for r in run.records):
        parts += ["### What failed", tables.failures(run.records)]
    return parts or ["No question was asked: nothing here is licensed."]


def _meetings(families: list[curves.Family]) -> list[str]:
    """Return, for each family of models, where VideoMamba meets the ViT."""
    parts = [f"{f.title}:\n\n{speed_tables.meetings(f)}" for f in families]
    return parts or ["No model has times at two lengths of the same batch, so no curve can meet another."]


def _plots(run: Run, families: list[curves.Family]) -> list[str]:
    """Draw the plots; return them, or why there are none."""
    parts = []

    def show(title: str, paths: list[Path], why: str) -> None:
        plot = f"![{title}]({paths[0].name})\n\nIn vectors: [{paths[1].name}]({paths[1].name})" if paths else why
        parts.append(f"### {title}\n\n{plot}")

    memory = "allocated" if _gpu(run) else "resident"
    for family in families:
        show(family.title, speed_figures.models(family, run.folder, memory), "")
    if not families:
        show("Models", [], "Not drawn: no model has times at two lengths of the same batch.")
    none = "Not drawn: no operator has both a time and a bound."
    show("Operators against the roofline", speed_figures.roofline(run.speeds, run.folder), none)
    pairs = paper.pairs(run.speeds)
    none = "Not drawn: race `stream` has no time."
    show("A stream, frame by frame", streaming.draw(run.speeds, run.folder), none)
    none = "Not drawn: race `chunks` has no time."
    show("Videos in chunks", chunking.draw(run.speeds, run.folder), none)
    none = f"Not drawn: it needs race `{paper.RACE}` at {paper.SIDE} px and 8 to 64 frames, a VideoMamba and a ViT both timed."
    show("The paper's comparison, redone", paper.draw(pairs, run.folder), none)
    return [*parts, paper.factors(pairs)] if pairs else parts


def _operators(speeds: list[Speed]) -> list[str]:
    """Return a table for each race of operators and dtype."""
    groups: dict[str, list[Speed]] = {}
    for s in speeds:
        if s.point.race in grids.races("operators"):
            groups.setdefault(f"{s.point.race}, {s.point.dtype}", []).append(s)
    return [f"### {title}\n\n{speed_tables.operators(mine)}" for title, mine in groups.items()] or ["None was asked."]


def _models(speeds: list[Speed]) -> list[str]:
    """Return a table for each race of models, mode and dtype."""
    groups: dict[str, list[Speed]] = {}
    for s in speeds:
        if s.point.race in grids.races("models"):
            groups.setdefault(f"{curves.race_title(s.point.race)}, {s.point.mode}, {s.point.dtype}", []).append(s)
    return [f"### {title}\n\n{speed_tables.models(mine)}" for title, mine in groups.items()] or ["None was asked."]


def split_videos(speeds: list[Speed]) -> list[str]:
    """Return a section with a table for each race of videos that come frame by frame or in chunks."""
    parts = []
    for race, head, made in (
        (streaming.RACE, "A causal model, frame by frame", streaming.frames),
        (chunking.RACE, "A bidirectional model, in chunks", chunking.passes),
    ):
        if mine := [s for s in speeds if s.point.race == race]:
            parts.append(f"### {head}\n\n{made(mine)}")
    return parts or ["None was asked."]


def _data(run: Run) -> list[str]:
    """Return how fast videos are read, with its plot; nothing where that was not asked."""
    mine = [s for s in run.speeds if s.point.race == reading.RACE]
    if not mine:
        return []
    steps = reading.trained([run, *reading.accepted_runs(environment.ROOT / "reports" / "accepted")], mine)
    plot = [f"![Clips read by one core]({path.name})" for path in reading.draw(run.speeds, run.folder)[:1]]
    return ["## Data", reading.section(mine, steps), *plot]


def _loops(run: Run) -> list[str]:
    """Return the loops of a user, with their plot; nothing where they were not asked."""
    if not any(s.point.race == loop.RACE for s in run.speeds):
        return []
    plot = [f"![A user's loop]({path.name})" for path in loop.draw(run.speeds, run.folder)[:1]]
    return ["## Loops", loop.section(run.speeds), *plot]


def _ceilings(run: Run) -> str:
    """Return the ceilings of the box as a table."""
    if not (found := run.about.get("ceilings")):
        return "Not measured; no share of a roofline is known."
    box = _box_ceilings(found)
    rows = []
    for size, rate in box.copies:
        what = f"memory, {size / 2**20:g} MiB moved again and again" if len(box.copies) > 1 else "copy, read plus written"
        rows.append((what, f"{speed_tables.number(rate / 1e9)} GB/s"))
    for dtype, rate in box.matmuls.items():
        rows.append((f"matrix product in {dtype or OLD_DTYPE}", f"{speed_tables.number(rate / 1e12)} TFLOP/s"))
    rows.append(("exponentials, float32", f"{speed_tables.number(box.exp / 1e9)} G/s"))
    return table(["ceiling", "is"], rows)


def _box_ceilings(found: dict[str, Any]) -> BoxCeilings:
    """Return the ceilings that run.json holds; older ones have one rate of copies, and one of the points' dtype."""
    if "copies" in found:
        return BoxCeilings.from_json(found)
    return BoxCeilings(((0, found["copy"]),), {"": found["matmul"]}, found["exp"])


def _how(run: Run) -> str:
    """Return how it was measured, with the numbers of this run."""
    timed = [s for s in run.speeds if s.seconds]
    early = sum(s.stopped == "budget" for s in timed)
    said = HOW.format(
        budget=run.about.get("plan", {}).get("budget", "?"),
        settled=f"{early} of {len(timed)} timings here ended before their interval was that narrow",
        operators=GPU_OPERATORS if _gpu(run) else "",
        memory=GPU_MEMORY if _gpu(run) else CPU_MEMORY,
    )
    return textwrap.fill(said, 128, break_long_words=False, break_on_hyphens=False)
