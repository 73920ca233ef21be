"""The comparison of the VideoMamba paper's first figure, redone: VideoMamba-Ti against a ViT-Ti with joint attention.

The paper compares with a ViT that writes its attention matrix out (here `reference`, "naive") and not with one that does not
(the others; the fastest is taken). The paper's factors, drawn with ours, were measured with a batch of 128 on an A100.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from matplotlib.ticker import FixedFormatter

from harness.records.speed import Speed
from harness.report import things
from harness.report.curves import MAMBA, VIT, fault_note, memory, seconds
from harness.report.figures import INK, Drawing, End, chart, label_ends, logarithmic, ticks
from harness.report.markdown import table

NAIVE = "reference"
RACE, SIDE, FRAMES = "tiny", 224, range(8, 65)
FILLS: dict[str, Literal["full", "none"]] = {"naive": "full", "best SDPA": "none"}
CLAIMED = ({32: 2.0, 64: 6.0}, {32: 20.0, 64: 40.0})  # by frames; Figure 1 of arXiv 2403.06977


@dataclass(frozen=True)
class Pair:
    """A VideoMamba and a ViT on the same clips; `against` is "naive" or "best SDPA"."""

    mamba: Speed
    vit: Speed
    against: str

    @property
    def doubts(self) -> str:
        """Return which of the two failed parity."""
        said = [f"{s.entry.name} {fault_note(s)}" for s in (self.mamba, self.vit) if fault_note(s)]
        return "; ".join(said)

    @property
    def throughput(self) -> float | None:
        """Return how many times the ViT's clips a second; None if the ViT has no speed."""
        return seconds(self.vit) / seconds(self.mamba) if self.vit.seconds else None

    @property
    def memory(self) -> float | None:
        """Return how many times less memory than the ViT; None without both."""
        ours, theirs = memory(self.mamba), memory(self.vit)
        return theirs / ours if ours and theirs else None


def pairs(speeds: Iterable[Speed]) -> list[Pair]:
    """Return every VideoMamba against both kinds of ViT, for each number of frames at the largest batch that both have."""
    points: dict[int, dict[int, list[Speed]]] = {}
    for s in speeds:
        p = s.point
        if (p.race, p.mode, p.way) == (RACE, "infer", "eager") and p.clips and p["S"] == SIDE and p["T"] in FRAMES:
            points.setdefault(p["T"], {}).setdefault(p["B"], []).append(s)
    found = []
    for _, batches in sorted(points.items()):
        for _, here in sorted(batches.items(), reverse=True):
            mambas = [s for s in here if s.entry.subject == MAMBA and s.seconds]
            vits = [s for s in here if s.entry.subject == VIT]
            if mambas and any(s.seconds for s in vits):
                rivals = {"naive": [s for s in vits if s.entry.implementation == NAIVE]}
                rivals["best SDPA"] = sorted((s for s in vits if s.seconds and s not in rivals["naive"]), key=seconds)[:1]
                found += [Pair(m, v, kind) for m in mambas for kind, group in rivals.items() for v in group]
                break
    return found


def draw(found: list[Pair], folder: Path) -> list[Drawing]:
    """Draw the factors of throughput and of memory over frames; nothing without a time."""
    if not any(p.vit.seconds for p in found):
        return []
    return [_draw(found, what, claimed, folder) for what, claimed in zip(("throughput", "memory"), CLAIMED, strict=True)]


def _draw(found: list[Pair], what: str, claimed: dict[int, float], folder: Path) -> Drawing:
    """Draw the lines of the first two implementations over both kinds of ViT, and the paper's factors."""
    names = sorted({p.mamba.entry.implementation for p in found}, key=things.rank)[:2]
    with chart(folder, f"paper-{what}") as axes:
        ends, doubts = [], []
        for name in names:
            for kind, fill in FILLS.items():
                mine = [p for p in found if (p.mamba.entry.implementation, p.against) == (name, kind)]
                line = {p.mamba.point["T"]: r for p in mine if (r := getattr(p, what))}
                look = things.look(name)
                if line:
                    axes.plot(list(line), list(line.values()), color=look.colour, marker=look.marker, fillstyle=fill)
                    ends.append(End(*list(line.items())[-1], look._replace(label=f"{look.label} over {kind} ViT")))
                doubts += [p.doubts for p in mine if p.doubts]
        axes.plot(list(claimed), list(claimed.values()), "D", color=INK, fillstyle="none", markersize=8)
        axes.set(xscale="log", yscale="log", xlabel="frames, and the largest batch timed")
        axes.axhline(1, color=INK, linewidth=1)
        batches = {p.mamba.point["T"]: p.mamba.point["B"] for p in found}
        places = sorted(batches.keys() | {8, 16, 32, 64})
        ticks(axes.xaxis, places)
        axes.xaxis.set_major_formatter(FixedFormatter([f"{T}\nbatch {batches[T]}" if T in batches else str(T) for T in places]))
        logarithmic(axes.yaxis)
        axes.set_ylabel(f"times the ViT's {what}" if what == "throughput" else "times less memory than the ViT")
        label_ends(axes, ends)
    said = (
        f"The paper's comparison, redone: {what} of VideoMamba-Ti over ViT-Ti, {SIDE} px, inference, eager. Above 1 VideoMamba "
    )
    said += "wins. Diamonds: the paper, A100, batch 128, over naive attention."
    return Drawing(folder / f"paper-{what}.svg", said + (f" {doubts[0][:90]}." if doubts else ""))


def factors(found: list[Pair]) -> str:
    """Return the factors as a table; a ViT without a speed shows why."""

    def cell(ratio: float | None, vit: Speed) -> str:
        return f"{ratio:.2g}x" if ratio else vit.status

    rows = [
        (p.mamba.point["T"], p.mamba.point["B"], p.mamba.entry.implementation, f"{p.against} ({p.vit.entry.implementation})",
         cell(p.throughput, p.vit), cell(p.memory, p.vit), p.doubts)
        for p in found
    ]  # fmt: skip
    return table(
        ["frames", "batch", "VideoMamba", "ViT's attention", "times the throughput", "times less memory", "notes"], rows
    )
