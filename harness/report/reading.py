"""Clips read from video files: how many one core reads, and how many cores feed a GPU that trains."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from harness.bench import grids
from harness.fixtures import encoded_film as film
from harness.records.speed import Entry, Speed
from harness.report import things, words
from harness.report.curves import fault_note, memory, seconds
from harness.report.figures import Drawing, chart, legend
from harness.report.markdown import sparse, table
from harness.report.speed_figures import WORDS
from harness.report.speed_tables import milliseconds, notes, number, ratio
from harness.runs.store import Run

RACE = "data"
FRAMES_ONLY, CLIP = "decode_frames", "read_clip"  # ours without and with the resizing
LOOP = "pyav"
HOW = f"""\
A film of {film.FRAMES / film.RATE:g} s, {film.RATE} frames/s, {film.WIDTH}x{film.HEIGHT}, H.264 (libx264, crf {film.CRF},
B-frames), with a key frame every "GOP" frames. A clip is that many frames at even distances. Times are CPU time of the process,
which other work on the machine changes little: clips/s are those of one core that does nothing else. `{FRAMES_ONLY}`, `pyav` (a
loop over all frames up to the last that is wanted), `decord` and `torchcodec` return frames of full size; `{CLIP}` is
`{FRAMES_ONLY}` and resizes them as well. Ours and `pyav` had to return the bytes of a full decode; readers that convert colours
by other code, its frames. Memory is the most that the process held resident, PyTorch included."""
CORES = f"""\
Cores that one GPU keeps busy: its clips/s over those of one core by `{CLIP}` on this machine. The newest run that timed ours in
training at this size is taken, this one or an accepted one, and there the fastest of each way. A step is without optimiser,
reading without augmentation."""


class Trained(NamedTuple):
    """The speed of a training step, and the folder's name of its run."""

    run: str
    gpu: str
    speed: Speed

    @property
    def rate(self) -> float:
        """Return clips per second."""
        return self.speed.point["B"] / seconds(self.speed)


def trained(runs: Iterable[Run], like: Iterable[Speed]) -> list[Trained]:
    """Return our fastest training steps on a GPU, for every size of the model, length of a clip and way.

    Their clips have the frames and the side of those that are read (`like`). Those of a size and length are of the newest run
    that has any.
    """
    lengths = {(s.point["T"], s.point["S"]) for s in like}
    found: list[Trained] = []
    for run in sorted(runs, key=lambda run: str(run.about.get("started")), reverse=True):
        gpu = run.about.get("box", {}).get("gpu")
        fastest: dict[tuple[str, int, str], Trained] = {}
        for s in run.speeds if gpu else ():
            p = s.point
            if p.race not in grids.races("models") or s.entry.role != "ours" or not s.seconds or p.mode != "train":
                continue
            if not p.clips or (p["T"], p["S"]) not in lengths or fault_note(s):
                continue
            step, key = Trained(run.folder.name, gpu, s), (p.race, p["T"], p.way)
            if key not in fastest or step.rate > fastest[key].rate:
                fastest[key] = step
        known = {(t.speed.point.race, t.speed.point["T"]) for t in found}
        found += (step for key, step in fastest.items() if key[:2] not in known)
    order = list(grids.races("models"))
    return sorted(found, key=lambda t: (order.index(t.speed.point.race), t.speed.point["T"], t.rate))


def accepted_runs(folder: Path) -> list[Run]:
    """Return the accepted benches of all devices under a folder."""
    runs = (Run.open(path.parent) for path in sorted(folder.glob("*/*/run.json")))
    return [run for run in runs if run.about["kind"] == "bench"]


def readers(speeds: Sequence[Speed]) -> str:
    """Return the speeds of all readers as a table."""
    ours = {s.point: s for s in speeds if s.entry.implementation == FRAMES_ONLY and s.seconds}
    rows = []
    for s in speeds:
        rate = number(1 / seconds(s)) if s.seconds else "-"
        held = number((memory(s) or 0) / 2**20) if s.seconds else "-"
        size = (s.point["G"], s.point["T"])
        rows.append((*size, _name(s.entry), milliseconds(s), rate, ratio(s, ours.get(s.point)), held, notes(s)))
    head = ["GOP", "frames", "reader", "ms of CPU, median [95 %]", "clips/s a core", f"time / {FRAMES_ONLY}'s", "peak MiB"]
    return sparse([*head, "notes"], rows)


def _name(entry: Entry) -> str:
    """Return a reader in words, with its name where that is another."""
    return words.implementation(entry.implementation, role=entry.role)


def cores(speeds: Sequence[Speed], steps: Sequence[Trained]) -> str:
    """Return how many cores feed a GPU at these training steps as a table, or why that is not known."""
    rates = {(s.point["T"], s.point["G"]): 1 / seconds(s) for s in speeds if s.entry.implementation == CLIP and s.seconds}
    lengths = dict.fromkeys(T for T, _ in rates)
    if not rates:
        return f"How many cores feed a GPU is not known: `{CLIP}` has no time here."
    gops = sorted({gop for _, gop in rates})
    rows: list[tuple[object, ...]] = []
    for t in steps:
        p = t.speed.point
        if p["T"] in lengths:
            needed = [number(t.rate / rates[p["T"], gop]) if (p["T"], gop) in rates else "-" for gop in gops]
            who = words.entry(t.speed.entry), p["T"], p["B"], words.WAYS.get(p.way, p.way)
            rows.append((*who, number(t.rate), *needed, f"{t.run}, {t.gpu}"))
    missing = [str(T) for T in lengths if not any(t.speed.point["T"] == T for t in steps)]
    none = f"No accepted run has a training step of ours with {' or '.join(missing)} frames: their cores are not known."
    head = ["model", "frames", "batch", "way", "clips/s in training", *(f"cores, GOP {gop}" for gop in gops), "from"]
    return "\n\n".join(filter(None, [table(head, rows) if rows else "", none if missing else ""]))


def section(speeds: Sequence[Speed], steps: Sequence[Trained]) -> str:
    """Return the section of a page on the race's speeds: both tables, with how they were measured."""
    parts = ["### Clips read from video files", readers(speeds), HOW, "### Cores that feed a GPU", CORES, cores(speeds, steps)]
    return "\n\n".join(parts)


def draw(speeds: Iterable[Speed], folder: Path) -> list[Drawing]:
    """Draw for each length of a clip the clips/s of a core by key frames' distance."""
    mine = [s for s in speeds if s.point.race == RACE]
    lengths = dict.fromkeys(s.point["T"] for s in mine)
    return [_draw([s for s in mine if s.point["T"] == T], T, folder) for T in lengths] if any(s.seconds for s in mine) else []


def _draw(speeds: Sequence[Speed], T: int, folder: Path) -> Drawing:
    """Draw a group of bars for every distance, each with its number above or the word for why there is none."""
    gops, entries = sorted({s.point["G"] for s in speeds}), list(dict.fromkeys(s.entry for s in speeds))
    width, stem = 0.85 / len(entries), f"{RACE}-T{T}"
    with chart(folder, stem) as axes:
        for s in speeds:
            x = gops.index(s.point["G"]) + (entries.index(s.entry) - (len(entries) - 1) / 2) * width
            rate = 1 / seconds(s) if s.seconds else 0.0
            axes.bar(x, rate, 0.94 * width, color=things.of(s.entry).colour)
            text = f"{rate:.3g}" if rate else WORDS.get(s.status, s.status)
            axes.annotate(text, (x, rate), (0, 2), textcoords="offset points", ha="center", va="bottom", fontsize=7,
                          rotation=0 if rate else 90)  # fmt: skip
        axes.set_xticks(range(len(gops)), [str(gop) for gop in gops])
        axes.margins(y=0.12)
        axes.grid(False, axis="x")
        axes.set(xlabel="frames from key frame to key frame (GOP)", ylabel="clips/s a core")
        legend(axes, [things.of(entry) for entry in entries], columns=3, linewidth=4, marker="")
    notes = sorted({fault_note(s)[:60] for s in speeds} - {""})
    said = "; ".join([f"Clips of {T} frames read by one core: medians of CPU time", *notes])
    return Drawing(folder / f"{stem}.svg", said + ".")
