"""The race `loop`: what a user waits for, the host's time included, of ours, upstream's kernels and the ViT."""

import fused
from harness.judge.race import LOOPS, NATIVE_KEPT, Race
from harness.records.speed import Entry, Point

VITS = {"tiny": "tiny", "middle": "base"}  # the ViT beside a VideoMamba
WIDTHS = {size: getattr(fused.VideoMambaConfig, size)().embed_dim for size in VITS}
CLIPS = {"infer": ((1, 8), (8, 8), (1, 64), (8, 64)), "train": ((8, 8), (1, 64))}  # (batch, frames)
WAYS = ("eager", "graphed", "graph", "compiled", "reduce-overhead")
SLOW = ("reference", "fused:torch")  # no rivals for speed on a GPU


def race() -> Race:
    """Return the race. It is timed only where it is named: compiling makes it long."""
    contenders = [(subject, name) for size, vit in VITS.items() for subject, name in (("videomamba", size), ("vit", vit))]
    return Race(
        "loop", LOOPS, points=points, contenders=tuple(contenders), licence=licence, runs=runs,
        maker="harness.bench.loop:make", fewest=lambda point: 4, by_default=False,
        title="a user's loop",
    )  # fmt: skip


def licence(dtype: str) -> tuple[str, ...]:
    """Return a case in the precision of each loop: training is under autocast, inference has parameters in the dtype."""
    precisions = (dtype,) if dtype == "float32" else (f"cast-{dtype}", f"autocast-{dtype}")
    return tuple(f"B2-T8-S64-D192-*L129-{precision}" for precision in precisions)


def points(grid: str) -> list[Point]:
    """Return both loops on clips of 8 and 64 frames; forms that compile, which takes long, come last."""
    if grid == "cpu":
        return [_point(WIDTHS["tiny"], 1, 2, 64, mode, way, "float32") for way in WAYS for mode in CLIPS]
    return [
        _point(width, B, T, 224, mode, way, "bfloat16")
        for ways in (WAYS[:3], WAYS[3:]) for frames in (8, 64) for width in WIDTHS.values()
        for mode, clips in CLIPS.items() for B, T in clips if T == frames for way in ways
    ]  # fmt: skip


def _point(width: int, B: int, T: int, side: int, mode: str, way: str, dtype: str) -> Point:
    sizes = {"D": width, "B": B, "T": T, "S": side, "L": 1 + T * (side // 16) ** 2}
    return Point("loop", tuple(sizes.items()), mode, way, dtype)


def runs(entry: Entry, point: Point, grid: str) -> bool:
    """Return whether an entry is timed: models of the point's size; `native_kept` is no form that is documented for speed."""
    [size] = [size for size, width in WIDTHS.items() if width == point["D"]]
    mine = entry.variant == (VITS[size] if entry.subject == "vit" else size)
    slow = entry.implementation == "reference" or (grid != "cpu" and entry.implementation in SLOW)
    return mine and not slow and entry.implementation != NATIVE_KEPT
