"""Models, modes, races, points and entries of a benchmark in words, as pages name them."""

from collections.abc import Callable, Iterable

from harness.records.speed import Entry, Point
from harness.report import things

MODES = {"infer": "inference", "train": "training"}
WAYS = {"graph": "CUDA graph", "chunked": "in chunks", "checkpointed": "checkpointed"}
MODELS = {"tiny": "Ti", "small": "S", "middle": "M", "base": "B"}  # by the size in the configuration's name
SIDE = 224  # pixels of a frame that are not said

# What a race is called in a sentence.
RACES = {
    "scan": "the scan", "scan-both": "the scan in both directions", "conv": "the convolution", "norm": "the norm",
    "mixer": "the Mamba mixer", "ssd": "the scan of Mamba-2", "mamba2": "the Mamba-2 mixer", "vamba": "Vamba",
    "bimba": "BIMBA's compressor", "retrieval": "matching of videos and texts", "loop": "a user's loop", "stream": "a stream",
    "chunks": "a video in chunks", "data": "reading of videos",
}  # fmt: skip
# What is drawn in a race that is a variant of another, by the variant.
DRAWS = {
    "fresh": "steps near 0.7, as a fresh model has them: states forget in tens of tokens",
    "long memory": "steps from 0.001 to 0.1, as Mamba's own initial values: states remember hundreds of tokens",
    "worst case": "inputs of which the native scan's state passes can leave nothing out and sum nothing by moments",
    "rescan": "inputs with which an exit of a state pass is wrong, so that one of its sequences is scanned again as a whole",
}
Sizes = dict[str, int]
# How the sizes of an operator's point are said.
SIZES: dict[str, Callable[[Sizes], str]] = {
    "scan": lambda n: f"scan, {_rows(n)}, {n['E']:,} channels",
    "scan-both": lambda n: f"scan in both directions, {_rows(n)}, {n['E']:,} channels",
    "conv": lambda n: f"convolution, {_rows(n)}, {n['E']:,} channels",
    "norm": lambda n: f"norm, {_rows(n)}, width {n['D']:,}",
    "mixer": lambda n: f"Mamba mixer, {_rows(n)}, width {n['D']:,}",
    "ssd": lambda n: f"scan of Mamba-2, {_rows(n)}, {n['H']} heads of {n['P']}, {n['N']} states",
    "mamba2": lambda n: f"Mamba-2 mixer, {_rows(n)}, width {n['D']:,}, {n['N']} states",
    "vamba": lambda n: (
        (f"Vamba, next token after {n['V']:,} of video" if n["L"] == 1 else f"Vamba, {n['V']:,} video tokens, {n['L']} of text")
        + f", {n['K']} layers"
    ),
    "bimba": lambda n: f"BIMBA, {n['F']} frames of {n['H']} x {n['W']} tokens to {n['G'] * n['Q']:,}, width {n['D']:,}",
    "retrieval": lambda n: f"{n['B']:,} videos and {n['M']:,} texts, the best {n['K']} matched",
}


def model(size: str) -> str:
    """Return the name of a VideoMamba by its size, such as "tiny"."""
    return f"VideoMamba-{MODELS.get(size, size)}"


def vit(size: str) -> str:
    """Return the name of a ViT by its size, such as "base"."""
    return f"ViT-{MODELS.get(size, size)}"


def race(name: str) -> str:
    """Return what a race is about."""
    known, variant = _known(name, {**MODELS, **RACES})
    return (model(known) if known in MODELS else RACES.get(known, known)) + variant


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
    sizes, (known, variant) = dict(at.dims), _known(at.race, {**MODELS, **SIZES})
    if known in MODELS:
        what = clips(sizes["B"], sizes["T"], sizes["S"]) if at.clips else _rows(sizes)
        said = f"{model(known)}{variant}, {what}"
    else:
        try:
            said = SIZES[known](sizes) + variant
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


def _rows(sizes: Sizes) -> str:
    return f"{sizes['B']} x {sizes['L']:,} tokens"


def _known(name: str, names: dict[str, object]) -> tuple[str, str]:
    """Return the race of which this one is a variant, such as "middle" of "middle-fresh", and the variant in words."""
    known = max((n for n in names if name == n or name.startswith(f"{n}-")), key=len, default=name)
    return known, f" ({name[len(known) + 1 :].replace('-', ' ')})" * (known != name)
