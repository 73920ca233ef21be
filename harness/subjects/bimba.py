"""The compressor of BIMBA: queries among video tokens, mixed by a bidirectional scan or by attention."""

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

import fused
import reference
from fused.modules import mamba
from harness.fixtures import functional_modules as modules
from harness.judge.case import Case
from harness.judge.implementation import Implementation, fused_implementations
from harness.judge.race import Race, timed_precision
from harness.records.ceilings import Ceilings, element_bytes
from harness.records.speed import Entry, Point

# Frames of rows x columns tokens, and frames of so many queries.
PAPER, RELEASED, LARGE = (64, 24, 24, 16, 144), (64, 27, 27, 64, 196), (64, 40, 40, 16, 400)
HOUR = (3600, 14, 14, 900, 49)  # at one frame a second
OVER_FRAMES = tuple((frames, 24, 24, frames // 4, 144) for frames in (4, 16, 256))  # the paper's recipe beside its own size


def sizes(B: int, F: int, H: int, W: int, G: int, Q: int, D: int) -> dict[str, int]:
    """Return the sizes of a case or point; L is the length of the sequence of tokens and queries."""
    return {"B": B, "F": F, "H": H, "W": W, "G": G, "Q": Q, "D": D, "L": F * H * W + G * Q}


def cases(grid: str) -> list[Case]:
    """Return ratios that are whole and broken, more queries than tokens, one query, odd frames, and every option.

    Those that can run in chunks have more rows than `forward_chunked` asks of the reference, which has no chunks.
    """
    tiny: list[tuple[dict[str, int], tuple[str, ...]]] = [
        (sizes(1, 2, 1, 2, 1, 2, 4), ()),
        (sizes(1, 3, 1, 1, 2, 1, 4), ("layers=2",)),
        (sizes(1, 1, 1, 3, 1, 2, 4), ("attention",)),
    ]
    small: list[tuple[dict[str, int], tuple[str, ...]]] = [
        (sizes(2, 3, 2, 3, 1, 6, 16), ()),
        (sizes(2, 3, 3, 5, 2, 7, 16), ()),
        (sizes(1, 1, 1, 3, 1, 7, 16), ()),
        (sizes(1, 3, 2, 3, 1, 1, 16), ()),
        (sizes(1, 3, 2, 3, 1, 6, 16), ("layers=2",)),
        (sizes(1, 5, 2, 2, 1, 3, 16), ("layers=3",)),
        (sizes(2, 3, 2, 3, 1, 6, 16), ("attention",)),
        (sizes(1, 3, 2, 3, 1, 6, 16), ("causal",)),
    ]
    float64 = [Case("bimba", tuple(s.items()), o, "float64") for s, o in tiny]
    if grid == "smoke":
        return float64 + modules.in_precisions(small, "bimba", half=False)
    small += [
        (sizes(1, 3, 2, 3, 1, 6, 16), ("layers=2", "every-frame")),
        (sizes(1, 3, 2, 3, 1, 6, 16), ("no-norm",)),
        (sizes(1, 3, 2, 3, 1, 6, 16), ("no-residual",)),
        (sizes(1, 4, 12, 12, 1, 36, 256), ()),
        (sizes(1, 2, 13, 13, 2, 49, 256), ()),
        (sizes(1, 4, 14, 14, 4, 49, 1024), ()),
    ]
    return float64 + modules.in_precisions(small, "bimba", half=True)


@functools.lru_cache(maxsize=1)
def implementations() -> list[Implementation]:
    """Return `BimbaCompressor` of the reference and of `fused`, by backend."""

    def call_with(backend: str) -> Callable[..., Any]:
        return lambda *args, **options: fused.BimbaCompressor(*args, **options, backend=backend)

    backends = fused_implementations(mamba.BACKENDS, call_with, every_backend=True)
    kept = [i for i in backends if i.backend != "native_kept"]  # the same as native at query rows
    return [Implementation("reference", reference.BimbaCompressor), *kept]


def build(call: Callable[..., Any], case: Case) -> nn.Module:
    """Return the module of a case."""
    return call(
        case["D"], n_layer=int(case.option("layers", "1")), bimamba=not case.has("causal"), use_norm=not case.has("no-norm"),
        use_res=not case.has("no-residual"), multi_scale=not case.has("every-frame"),
        mixer_type="attention" if case.has("attention") else "mamba",
    )  # fmt: skip


def draw(case: Case, seed: int) -> dict[str, Tensor]:
    """Draw tokens, queries and a trained compressor's parameters."""
    B, F, H, W, G, Q, D, _ = (size for _, size in case.dims)
    inputs = {"tokens": case.normal(seed, "tokens", B, F, H, W, D), "queries": case.normal(seed, "queries", B, G, Q, D)}
    return inputs | modules.parameters(modules.on_meta(build, reference.BimbaCompressor, case), case, seed)


def precise(case: Case) -> set[str]:
    """Return those of `functional_modules.precise`."""
    module = modules.on_meta(build, reference.BimbaCompressor, case)
    return modules.precise(case, module, {"tokens", "queries"}, set())


def no_cotangent(case: Case) -> set[str]:
    """Return nothing: the only output has a cotangent."""
    return set()


def output_values(case: Case) -> int:
    """Return the values of the queries."""
    return case["B"] * case["G"] * case["Q"] * case["D"]


def steps(case: Case) -> float:
    """Return the steps of two scans a layer."""
    return case["L"] * (1 + case["B"] * case["D"] * 32 / 20000) * 2 * int(case.option("layers", "1"))


def evaluate(call: Callable[..., Any], case: Case, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the compressed queries."""
    with modules.precision(case, leaves):
        module = modules.on_meta(build, call, case)
        return {"out": modules.call(module, leaves, lambda m, t, q: m(t, q), leaves["tokens"], leaves["queries"])}


def forward_chunked(
    call: Callable[..., Any], case: Case, leaves: dict[str, Tensor], frames: int
) -> dict[str, Tensor]:
    """Return the compressed queries, by chunks of `frames` frames."""

    def run(module: Any, tokens: Tensor, queries: Tensor) -> Tensor:
        return module.forward_chunked(iter(tokens.split(frames, dim=1)), queries)

    with modules.precision(case, leaves):
        return {"out": modules.call(modules.on_meta(build, call, case), leaves, run, leaves["tokens"], leaves["queries"])}


def chunk_frames(case: Case) -> list[int]:
    """Return chunks of one frame and of two, for a compressor of one layer that scans several frames."""
    return [] if case["F"] == 1 or case.has("attention") or case.option("layers", "1") != "1" else [1, 2]


def costly_checks(case: Case) -> set[str]:
    """Return `writes` for all cases, and at a broken ratio `compile` under autocast and `device` without."""
    if case.fits(B=2, F=3, H=3):
        return {"writes"} | {("autocast",): {"compile"}, (): {"device"}}.get(case.options, set())
    return {"writes"}


def races() -> list[Race]:
    """Return the race at the sizes of the paper and of the released model, and over frames, against other ways; and an hour."""

    def points(grid: str) -> list[Point]:
        shapes = [(1, 4, 12, 12, 1, 36, 128), (1, 4, 13, 13, 4, 49, 128)] if grid == "cpu" else []
        if grid == "full":
            shapes = [(1, *size, D) for D in (1024, 3584) for size in (PAPER, RELEASED)] + [(1, *LARGE, 4096)]
            shapes += [(1, *size, 3584) for size in OVER_FRAMES]
        dtype = "float32" if grid == "cpu" else "bfloat16"
        return [
            Point("bimba", tuple(sizes(*shape).items()), mode, dtype=dtype) for shape in shapes for mode in ("infer", "train")
        ]

    def runs(entry: Entry, point: Point, grid: str) -> bool:
        name = entry.implementation
        if grid == "cpu":
            return True
        if name == "attention-naive":  # at other sizes it is out of memory as at the largest of these
            return point["D"] == 1024 or (point["H"] == PAPER[1] and point["F"] <= PAPER[0])
        # plain PyTorch goes token by token, minutes long; upstream's fused mixer takes as long as its parts
        return name not in ("fused:torch", "fused:mamba_ssm_inner")

    def hour(grid: str) -> list[Point]:
        shapes = {"cpu": [(1, 80, 2, 2, 20, 1, 64)], "full": [(1, *HOUR, 3584)]}.get(grid, [])
        dtype = "float32" if grid == "cpu" else "bfloat16"
        return [Point("bimba-hour", tuple(sizes(*shape).items()), "infer", dtype=dtype) for shape in shapes]

    contenders = ("bimba", ""), ("resamplers", "")
    return [
        Race(
            "bimba", order=8, points=points, contenders=contenders, runs=runs, options=("cast",), title="BIMBA's compressor",
            words=lambda n: f"BIMBA, {n['F']} frames of {n['H']} x {n['W']} tokens to {n['G'] * n['Q']:,}, width {n['D']:,}",
        ),
        Race(
            "bimba-hour", order=8, points=hour, contenders=contenders[:1], runs=runs, maker="harness.bench.hour:make",
            title="BIMBA's compressor, tokens on the host", slowest=30.0, words=lambda n: (
                f"BIMBA, {n['F']:,} frames of {n['H']} x {n['W']} tokens on the host to {n['G'] * n['Q']:,}, width {n['D']:,}"
            ),
        ),
    ]  # fmt: skip


def licence(dtype: str) -> tuple[str, ...]:
    """Return a whole ratio and a broken one."""
    precision = timed_precision(dtype)
    return f"B1-F4-H12-*-D256-*-{precision}", f"B1-F2-H13-*-D256-*-{precision}"


def bound(point: Point, variant: str, ceilings: Ceilings) -> float:
    """Return the least seconds of one layer, its parts one after another: products, convolution, scan."""
    tokens, queries = point["B"] * point["L"], point["B"] * point["G"] * point["Q"]
    D, N, size, train = point["D"], 16, element_bytes(point.dtype), point.mode == "train"
    E, R = 2 * D, -(-D // 16)
    operations = 2.0 * (tokens * (D * E + 2 * (E * (R + 2 * N) + R * E)) + queries * 2 * D * E) * (3 if train else 1)
    conv = tokens * E * size * 3 * (2 if train else 1) / ceilings.copy
    return operations / ceilings.matmul + conv + 2 * tokens * E * scan_seconds(queries / tokens, E, N, size, train, ceilings)


def scan_seconds(share: float, E: int, N: int, size: int, train: bool, ceilings: Ceilings) -> float:
    """Return the least seconds of a direction's scan for a token and channel, with y for a `share` of the tokens.

    As `scan.seconds`, without what only tokens with outputs need: C h, the gate, z and y.
    """

    def slowest(moved: float, exps: float, issued: float) -> float:
        return max(moved / ceilings.copy, exps / ceilings.exp, issued / ceilings.issue)

    forward = slowest((2 + 2 * share) * size + N * size / E, N + 4 * share, 3 * N + 20 + (2 * N + 10) * share)
    if not train:
        return forward
    moved = (4 + 3 * share) * size + 4 * N / 16 + 16 * N / E + 8 * 2 * N / 64
    return forward + slowest(moved, N + 5 * share, (10.5 + 2 * share) * N + 59)
