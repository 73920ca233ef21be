"""The race of Vamba: its points, its contenders, and what the hardware needs at least."""

from collections.abc import Mapping

from harness.judge.race import Race, few_samples, timed_precision
from harness.records.ceilings import Ceilings, element_bytes
from harness.records.speed import Entry, Point
from harness.subjects import ssd

PAIR_TOKENS = 299  # of two frames of 640 x 360 pixels


def licence(dtype: str) -> tuple[str, ...]:
    """Return one case."""
    return (f"B2-L7-V11-*-layers=2-{timed_precision(dtype)}",)


def races() -> list[Race]:
    """Return the race at the published sizes: prefill of 28 layers, a decoded token, a training step of two layers."""

    def points(grid: str) -> list[Point]:
        if grid == "cpu":
            size = {"B": 1, "L": 16, "V": 197, "K": 2, "D": 64}
            dims = [(size, "infer"), (size | {"L": 1}, "infer"), (size, "train")]
            return [Point("vamba", tuple(d.items()), mode, dtype="float32") for d, mode in dims]
        if grid != "full":
            return []
        found = []
        for frames in (128, 256, 512, 1024):
            size = {"B": 1, "L": 64, "V": frames // 2 * PAIR_TOKENS, "K": 28, "D": 3584}
            found.append(Point("vamba", tuple(size.items()), "infer"))
            found.append(Point("vamba", tuple((size | {"L": 1}).items()), "infer", "graph"))
            if frames < 512:
                found.append(Point("vamba", tuple((size | {"K": 2, "L": 512}).items()), "train"))
        return found

    def runs(entry: Entry, point: Point, grid: str) -> bool:
        if entry.subject == "qwen2":
            return point["L"] > 1
        return entry.implementation in ("fused:native", "upstream") or (grid == "cpu" and entry.implementation == "fused:torch")

    def fewest(point: Point) -> int:
        return 2 if point["V"] > 50_000 else few_samples(point)  # a prefill of the stock layers takes seconds

    contenders, maker = (("vamba", ""), ("qwen2", "")), "harness.bench.vamba:make"
    return [
        Race(
            "vamba", order=8, points=points, contenders=contenders, runs=runs, maker=maker, fewest=fewest, slowest=30.0,
            title="Vamba", words=in_words,
        )
    ]  # fmt: skip


def in_words(sizes: Mapping[str, int]) -> str:
    """Return the sizes of a point: a video's prefill and training, or the next token."""
    video, text = f"{sizes['V']:,}", sizes["L"]
    said = f"next token after {video} of video" if text == 1 else f"{video} video tokens, {text} of text"
    return f"Vamba, {said}, {sizes['K']} layers"


def bound(point: Point, variant: str, ceilings: Ceilings) -> float:
    """Return the least seconds: products and weights of the layers, the scans, and keys and values of the video.

    A decoded token reads all weights of the text, and keys and values, once.
    """
    D, K, size, train = point["D"], point["K"], element_bytes(point.dtype), point.mode == "train"
    E, keys, vocabulary = (18944, 1024, 152064) if D == 3584 else (2 * D, D, 64)
    P, N = (64, 128) if D == 3584 else (16, 16)
    inner, passes = 2 * D, 3 if train else 1
    text = K * (3 * D * E + 2 * (2 * D * D + D * keys)) + D * vocabulary
    tokens, words = point["B"] * point["V"], point["B"] * point["L"]
    cached = K * keys * tokens
    pairs = 2.0 * 2 * K * words * point["V"] * D  # queries and keys of the cross-attention, twice
    if point["L"] == 1:
        return (text + cached) * size / ceilings.copy + (2.0 * text * words + pairs) / ceilings.matmul
    mixer = D * (3 * inner + 2 * N + inner // P)
    products = 2.0 * tokens * ((K - 1) * mixer + K * D * keys) + 2.0 * words * text + pairs
    moved = passes * size * (text + (K - 1) * mixer + 2 * cached + (K - 1) * tokens * 7 * inner)
    scans = (K - 1) * ssd.seconds(tokens, inner // P, P, N, size, train, ceilings)
    return passes * products / ceilings.matmul + moved / ceilings.copy + scans
