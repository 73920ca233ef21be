"""How a benchmark was measured: the words of its page, and the ceilings of its machine."""

import textwrap
from typing import Any

from harness.bench.interleave import FEWEST, GOAL, MOST
from harness.bench.worker import WARM
from harness.records.ceilings import BoxCeilings
from harness.records.interval import RESAMPLES
from harness.records.speed import MODES, WAYS
from harness.report import speed_tables
from harness.report.markdown import table
from harness.runs.store import Run

OLD_DTYPE = "the points' dtype"  # which older runs did not name
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
An entry of ours has a time only if parity passed in this run. A rival is timed in any case; its time has a mark, with the
factor, if its error was more than a tenth over its budget. `[low, high]` is the 95 % interval of the median; two entries whose
intervals overlap are not told apart. Time over another's is below 1 where the row is faster. `out of memory` is the entry's own
doing; longer points of the same curve are `not tried`. The share of the roofline is the least time that this box needs for the
point, by the ceilings above, over the time taken: 100 % cannot be beaten. What was faster shows that a ceiling was measured too
low, or holds for DRAM and not for a cache: it has `no bound`, with the reason, and no share. Where curves meet is read off
straight lines in logarithms between neighbouring points, against the fastest ViT of the same way; it is as good as the points
are close. Every sample of a stream is the next frame, CLS's not among them: its median and 99th percentile are of what a caller
waits. On a GPU the memory of a stream is the peak of its capture and what the frames before have left. Chunks are held against
the pass over the whole video, in training one that runs every mixer again in the backward."""


def on_gpu(run: Run) -> bool:
    """Return whether a run was on a GPU."""
    return str(run.about.get("plan", {}).get("device", "")).startswith("cuda")


def ceilings(run: Run) -> str:
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


def measured(run: Run) -> str:
    """Return how it was measured, with the numbers of this run, how the tables are read, and the words for modes and ways."""
    timed = [s for s in run.speeds if s.seconds]
    early = sum(s.stopped == "budget" for s in timed)
    said = HOW.format(
        budget=run.about.get("plan", {}).get("budget", "?"),
        settled=f"{early} of {len(timed)} timings here ended before their interval was that narrow",
        operators=GPU_OPERATORS if on_gpu(run) else "",
        memory=GPU_MEMORY if on_gpu(run) else CPU_MEMORY,
    )
    parts = textwrap.fill(said, 128, break_long_words=False, break_on_hyphens=False), READ
    return "\n\n".join([*parts, "\n".join(f"- `{word}`: {what}" for word, what in (MODES | WAYS).items())])
