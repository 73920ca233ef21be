"""The race of video-text retrieval: its points, what licenses an entry, and the least time of a point."""

from harness.judge.race import Race, timed_precision
from harness.records.ceilings import Ceilings, element_bytes
from harness.records.speed import Entry, Point
from harness.subjects.retrieval.sides import FUSION, LAYERS


def races() -> list[Race]:
    """Return the race: of B videos and M texts of L words, the best K candidates of either side are matched."""

    def points(grid: str) -> list[Point]:
        small = {"B": 8, "M": 8, "K": 4, "L": 8, "V": 16, "C": 64, "D": 32}
        full = {"B": 1000, "M": 1000, "K": 128, "L": 32, "V": 1568, "C": 768, "D": 576}
        sizes = {"cpu": [small], "full": [full | {"B": 100, "M": 100}, full]}.get(grid, [])
        dtype = "float32" if grid == "cpu" else "bfloat16"
        return [Point("retrieval", tuple(size.items()), "infer", dtype=dtype) for size in sizes]

    def runs(entry: Entry, point: Point, grid: str) -> bool:
        return True

    # all layers for 134,000 pairs are some 2e15 operations: tens of seconds on a GPU that reaches a tenth of its peak
    contenders, maker = (("retrieval", ""),), "harness.bench.retrieval:make"
    return [
        Race(
            "retrieval", order=9, points=points, contenders=contenders, runs=runs, maker=maker, slowest=60.0,
            title="matching of videos and texts",
            words=lambda n: f"{n['B']:,} videos and {n['M']:,} texts, the best {n['K']} matched",
        )
    ]  # fmt: skip


def licence(dtype: str) -> tuple[str, ...]:
    """Return one video with all texts."""
    return (f"B5-L7-V9-*-shared-{timed_precision(dtype)}",)


def bound(point: Point, variant: str, ceilings: Ceilings) -> float:
    """Return the least seconds: the products of the texts' layers once, of the videos' keys and values once, of three layers a
    pair; and the videos read once.

    Pairs are the fewest that there can be: the best K of every video, or of every text."""
    N, M, K, L, V, C, D = (point[letter] for letter in "BMKLVCD")
    pairs = max(N * min(K, M), M * min(K, N))
    words = 12 * C * C  # of a layer: attention and an MLP of four times the width
    layer = L * (words + 2 * C * C) + 2 * L * (V + L) * C
    layers, fusion = (12, 3) if C == 768 else (LAYERS, LAYERS - FUSION)
    products = 2.0 * ((layers - fusion) * M * L * words + fusion * (N * V * 2 * C * D + pairs * layer))
    return products / ceilings.matmul + N * V * D * element_bytes(point.dtype) / ceilings.copy
