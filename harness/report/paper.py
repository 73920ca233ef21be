"""The comparison of the VideoMamba paper's first figure, redone: VideoMamba-Ti against a ViT-Ti with joint attention.

The paper compares with a ViT that writes its attention matrix out (here `reference`, "naive") and not with one that does not
(the others; the fastest is taken). The paper's factors, drawn with ours, were measured with a batch of 128 on an A100.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedFormatter, FixedLocator, FuncFormatter, LogLocator, NullFormatter

from harness.records.speed import Speed
from harness.report.curves import MAMBA, VIT, fault_note, memory, seconds
from harness.report.figures import STYLE, colour, legend_below, save
from harness.report.markdown import table
from harness.report.speed_figures import MARKERS

NAIVE = "reference"
RACE, SIDE, FRAMES = "tiny", 224, range(8, 65)
CLAIMED = ({32: 2.0, 64: 6.0}, {32: 20.0, 64: 40.0})  # by frames; Figure 1 of arXiv 2403.06977
LOOKS: dict[str, dict[str, Any]] = {
    "naive": {"linestyle": "solid"},
    "best SDPA": {"linestyle": (0, (5, 2)), "markerfacecolor": "white"},
}


@dataclass(frozen=True)
class Pair:
    """A VideoMamba and a ViT on the same clips; `against` is a key of LOOKS."""

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


def draw(found: list[Pair], folder: Path) -> list[Path]:
    """Draw paper.png and .svg: factors of throughput and memory over frames. Return their paths; none without a time."""
    if not any(p.vit.seconds for p in found):
        return []
    names = list(dict.fromkeys(p.mamba.entry.implementation for p in found))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10.5, 4.4), layout="constrained")
        figure.suptitle(f"VideoMamba-Ti over ViT-Ti with joint attention: {SIDE} px, inference, eager; above 1 VideoMamba wins")
        titles = "throughput: ViT's time / VideoMamba's", "memory: ViT's peak / VideoMamba's"
        for axes, title, claimed, what in zip(figure.subplots(1, 2), titles, CLAIMED, ("throughput", "memory"), strict=True):
            for place, name in enumerate(names):
                for kind, look in LOOKS.items():
                    mine = [p for p in found if (p.mamba.entry.implementation, p.against) == (name, kind)]
                    line = [(p.mamba.point["T"], r) for p in mine if (r := getattr(p, what))]
                    xs, ys = zip(*line, strict=True) if line else ((), ())
                    axes.plot(xs, ys, color=colour(place), marker=MARKERS[place % len(MARKERS)], **look)
            axes.plot(list(claimed), list(claimed.values()), "D", color="black", markerfacecolor="white", markersize=8)
            _axes(axes, found)
            axes.set_ylabel(title)
        handles = [
            Line2D([], [], color=colour(i), marker=MARKERS[i % len(MARKERS)], label=_label(found, name, kind), **look)
            for i, name in enumerate(names)
            for kind, look in LOOKS.items()
        ]
        handles.append(Line2D([], [], marker="D", color="black", markerfacecolor="white", linewidth=0, markersize=8))
        handles[-1].set_label("the paper, A100, batch 128, over naive attention")
        legend_below(figure, handles)
        return save(figure, folder, "paper")


def _label(found: list[Pair], name: str, kind: str) -> str:
    """Return the legend's entry of an implementation against a kind of ViT."""
    doubts = max((p.doubts for p in found if (p.mamba.entry.implementation, p.against) == (name, kind)), default="")
    return f"{name} over {kind} attention" + f" ({doubts[:70]})" * bool(doubts)


def _axes(axes: Axes, found: list[Pair]) -> None:
    """Set logarithmic axes with frames and batches below."""
    axes.set(xscale="log", yscale="log", xlim=(7, 73))
    axes.axhline(1, color="black", linewidth=1)
    axes.grid(True, which="major", color="0.9")
    axes.set_axisbelow(True)
    batches = {p.mamba.point["T"]: p.mamba.point["B"] for p in found}
    ticks = sorted(batches.keys() | {8, 16, 32, 64})
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_major_formatter(FixedFormatter([f"{T}\nbatch {batches[T]}" if T in batches else str(T) for T in ticks]))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}x"))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("frames (T), and the largest batch timed")


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
