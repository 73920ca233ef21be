"""Models, modes, races, points and entries of a benchmark in words, as pages name them."""

from collections.abc import Iterable

from harness.bench import grids
from harness.judge.race import MODELS, Race, rows
from harness.records.speed import Entry, Point
from harness.report import things
from harness.subjects.videomamba import timing

MODES = {"infer": "inference", "train": "training"}
WAYS = {"graph": "CUDA graph", "chunked": "in chunks", "checkpointed": "checkpointed"}
LETTERS = {**timing.LETTERS, "base": "B"}  # of a model in its name, by the size in the configuration's
SIDE = 224  # pixels of a frame that are not said

# What is drawn in a race that is a variant of another, by the variant.
DRAWS = {
    "fresh": "steps near 0.7, as a fresh model has them: states forget in tens of tokens",
    "long memory": "steps from 0.001 to 0.1, as Mamba's own initial values: states remember hundreds of tokens",
    "worst case": "inputs of which the native scan's state passes can leave nothing out and sum nothing by moments",
    "rescan": "inputs with which an exit of a state pass is wrong, so that one of its sequences is scanned again as a whole",
}


def model(size: str) -> str:
    """Return the name of a VideoMamba by its size, such as "tiny"."""
    return f"VideoMamba-{LETTERS.get(size, size)}"


def vit(size: str) -> str:
    """Return the name of a ViT by its size, such as "base"."""
    return f"ViT-{LETTERS.get(size, size)}"


def race(name: str) -> str:
    """Return what a race is about; of an unknown one the name."""
    known = grids.races().get(name)
    return known.title + _variant(known) if known else name


def draws(named: Iterable[str]) -> str:
    """Return in a sentence what the variants are that stand in names of races or points; "" for none."""
    every = [*named]
    said = [f"({word}): {what}" for word, what in DRAWS.items() if any(f"({word})" in name for name in every)]
    return f"Inputs: {'; '.join(said)}." if said else ""


def clips(count: int, frames: int, side: int = SIDE) -> str:
    """Return a batch of clips in words; the side of a frame is said where it is not the usual one."""
    return f"{count} clip{'s' * (count != 1)} of {frames:,} frame{'s' * (frames != 1)}" + f", {side} px" * (side != SIDE)


def point(at: Point, with_dtype: bool = False, with_way: bool = False) -> str:
    """Return a point of operators or models in words, without its mode; of an unknown race, or without a size that its words
    need, by its letters.

    With its way, that is said where it is not eager.
    """
    sizes, known = dict(at.dims), grids.races().get(at.race)
    if known and known.kind == MODELS:
        said = f"{race(at.race)}, " + (clips(sizes["B"], sizes["T"], sizes["S"]) if at.clips else rows(sizes))
    else:
        try:
            said = known.words(sizes) + _variant(known) if known and known.words else letters(at)
        except KeyError:
            said = letters(at)
    said += f", {WAYS.get(at.way, at.way)}" * (with_way and at.way != "eager")
    return said + f", {at.dtype}" * with_dtype


def letters(at: Point) -> str:
    """Return a point's race and sizes by their letters, as its name has them."""
    return " ".join([at.race, *(f"{k}{v}" for k, v in at.dims)])


def entry(of: Entry) -> str:
    """Return an entry by its model and its look."""
    label = things.of(of).label
    if of.subject == "vit" and of.variant:
        return label.replace("ViT", vit(of.variant), 1)
    return f"{model(of.variant)}, {label}" if of.variant else label


def implementation(name: str, subject: str = "", role: str = "ours") -> str:
    """Return an implementation's look in words, with its name on the command line where that is another."""
    label = things.look(name, subject).label
    said = label if label == name else f"{label} ({name})"
    return said + ", rival" * (role == "rival")


def _variant(of: Race) -> str:
    return f" ({of.variant})" * bool(of.variant)
