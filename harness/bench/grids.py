"""Which points a sweep times, and who runs there."""

import statistics
from collections.abc import Iterable
from dataclasses import replace

import torch

from harness.baselines import attention
from harness.bench.clock import Call, Clock
from harness.judge.registry import Implementation, subjects
from harness.records.speed import Entry, Point

OPERATORS = {"scan": "scan", "scan-both": "scan_both", "conv": "conv", "norm": "norm", "mixer": "mixer"}
MODELS = {"tiny": ("tiny", "tiny"), "small": ("small", "small"), "middle": ("middle", "base")}  # VideoMamba against ViT
# A video that comes in pieces: the sizes of VideoMamba that are timed there on a GPU.
PIECEWISE = {"stream": ("tiny", "small", "middle"), "chunks": ("middle",)}
RACES = (*OPERATORS, *MODELS, *PIECEWISE)
GRIDS = ("cpu", "full", "long")
KEPT = "fused:native_kept"  # native but for the backward pass of a mixer
MODEST = 12_545  # tokens, 64 frames: what the paper compares goes no further
LITTLE = 1569  # tokens, 8 frames
HOUR = 3600  # frames, one a second


def points(grid: str) -> list[Point]:
    """All points, short ones first within a race."""
    return {"cpu": _cpu, "full": _full, "long": _long}[grid]()


def entries(race: str, device: str, fastest: str, names: tuple[str, ...] = ()) -> list[Entry]:
    """Everybody who can run a race here but the reference, whose loop no one would use: every implementation of ours and its
    rivals, and the ViT with naive attention and with the `fastest` of this box. `names` keeps some of them."""
    if race in OPERATORS:
        found = _entries(OPERATORS[race], "", device)
    elif race in PIECEWISE:
        maker = {"maker": "harness.bench.streaming:make"} if race == "stream" else {}
        able = {i.name for i in subjects()["videomamba"].implementations() if i.abilities and i.abilities.initial_state}
        every = [e for size in dict.fromkeys(("tiny", *PIECEWISE[race])) for e in _entries("videomamba", size, device)]
        found = [replace(e, **maker) for e in every if e.implementation in able]
    else:
        mamba, vit = MODELS[race]
        found = _entries("videomamba", mamba, device)
        found += [Entry("vit", kind, "rival", variant=vit) for kind in ("reference", fastest)]
    return [e for e in found if not names or e.implementation in names]


def _entries(subject: str, variant: str, device: str) -> list[Entry]:
    racing = [i for i in subjects()[subject].implementations() if i.absent(device) is None]
    return [Entry(subject, i.name, i.role, variant=variant) for i in racing if _races(subject, i)]


def runs(entry: Entry, point: Point, grid: str) -> bool:
    """Whether an entry is timed at a point of its race. Among models PyTorch's own scan on a GPU and the naive attention are no
    rivals for speed: they are timed eagerly, not captured or compiled, in grid `full` up to 8 and up to 64 frames. What comes
    in pieces is run by the fastest backend, in the sizes of PIECEWISE; in grid `cpu` by the one that is there, in the least.
    KEPT differs where there is a backward pass of a whole mixer, and nowhere else."""
    if entry.implementation == KEPT and (point.mode != "train" or point.race in PIECEWISE):
        return False
    if point.race in PIECEWISE:
        if grid == "cpu":
            return entry.variant == "tiny"
        return entry.variant in PIECEWISE[point.race] and entry.implementation != "fused:torch"
    most = {"fused:torch": LITTLE, "reference": MODEST}.get(entry.implementation)
    if not entry.variant or most is None:
        return True
    return point.way == "eager" and (grid != "full" or point.tokens <= most)


def attentions(device: str, dtype: str) -> dict[str, float]:
    """Seconds of one attention, forward and backward, by every kernel that can be pinned here; the ViT gets the fastest. Only
    where none can it gets PyTorch's choice, which may be another under parity's settings than under the clock."""
    clock, found = Clock(device), {}
    heads, length = (12, 12545) if device.startswith("cuda") else (3, 257)
    q, k, v = (torch.randn(1, heads, length, 64, device=device, dtype=getattr(torch, dtype), requires_grad=True) for _ in "qkv")
    here = [k for k in attention.PINNED if not attention.unavailable(k, device) and q.dtype in attention.dtypes(k)]
    for kind in here or ["sdpa"]:

        def step(kind: str = kind) -> object:
            with attention.only(kind, q.device):
                return torch.autograd.grad(attention.attend(q, k, v, kind).sum(), (q, k, v))

        clock.warm(Call(step), 3)
        found[kind] = statistics.median(clock.time(Call(step)) for _ in range(7))
    return found


def absent(races: Iterable[str], device: str) -> list[dict[str, str]]:
    """Who would race in these races but cannot run here, and why."""
    models = ("videomamba",), ("videomamba", "vit")
    raced = dict.fromkeys(s for r in races for s in ((OPERATORS[r],) if r in OPERATORS else models[r in MODELS]))
    every = [(s, i) for s in raced if s in subjects() for i in subjects()[s].implementations() if _races(s, i)]
    return [
        {"subject": s, "implementation": i.name, "role": i.role, "reason": why} for s, i in every if (why := i.absent(device))
    ]


def _races(subject: str, implementation: Implementation) -> bool:
    return implementation.name not in (("timm", "sdpa") if subject == "vit" else ("reference",))


def _operators(shapes: list[tuple[int, int, int]], dtype: str, races: Iterable[str] = OPERATORS) -> list[Point]:
    found = []
    for race in races:
        for B, E, L in shapes:
            sizes = {"B": B, "L": L, "E": E}
            sizes = {**sizes, "N": 16} if race.startswith("scan") else {**sizes, "K": 4} if race == "conv" else sizes
            if race in ("norm", "mixer"):
                sizes = {"B": B, "L": L, "D": E // 2}
            found += [Point(race, tuple(sizes.items()), mode, dtype=dtype) for mode in ("infer", "train")]
    return found


def _models(race: str, clips: list[tuple[int, int]], side: int, ways: tuple[str, ...], dtype: str) -> list[Point]:
    found = []
    for mode in ("infer", "train"):
        for way in ways:
            for B, T in clips:
                sizes = {"B": B, "T": T, "S": side, "L": 1 + T * (side // 16) ** 2}
                found.append(Point(race, tuple(sizes.items()), mode, way, dtype))
    return found


def _tokens(race: str, sizes: list[tuple[int, int]], ways: tuple[str, ...], dtype: str) -> list[Point]:
    """Blocks and final norm only: a clip's length is odd by its class token, and upstream's scan is at its best at multiples
    of 2048."""
    modes = ("infer", "train")
    return [Point(race, (("B", B), ("L", L)), mode, way, dtype) for mode in modes for way in ways for B, L in sizes]


def _stream(seen: list[int], side: int, way: str, dtype: str) -> list[Point]:
    """One more frame, after so many."""
    return [
        Point("stream", (("B", 1), ("T", 1), ("S", side), ("L", (side // 16) ** 2), ("A", n)), "infer", way, dtype)
        for n in seen
    ]


def _chunks(mode: str, frames: int, chunks: list[int], side: int, dtype: str, whole: bool = True) -> list[Point]:
    """A video in chunks of several lengths, and, where it fits, as one."""
    sizes = (("B", 1), ("T", frames), ("S", side), ("L", 1 + frames * (side // 16) ** 2))
    found = [Point("chunks", (*sizes, ("F", n)), mode, "chunked", dtype) for n in chunks]
    return found + [Point("chunks", sizes, mode, "eager" if mode == "infer" else "checkpointed", dtype)] * whole


def _cpu() -> list[Point]:
    found = _operators([(1, 384, 197), (1, 384, 785)], "float32")
    found += _models("tiny", [(1, 1), (1, 4), (1, 16), (1, 64)], 64, ("eager",), "float32")
    found += _stream([4, 32], 64, "eager", "float32")
    return found + [p for mode in ("infer", "train") for p in _chunks(mode, 4, [1, 2], 64, "float32")]


def _full() -> list[Point]:
    shapes, dtype = [(8, 384, 1569), (8, 1152, 1569), (1, 1152, 12545)], "bfloat16"
    longer = [(8, 1152, 2048), (1, 1152, 12288), (64, 1152, 197), (1, 1152, 100353)]
    found = _operators(shapes[1:], dtype, ["scan"]) + _operators(shapes + longer, dtype, ["scan-both"])
    found += _operators(shapes, dtype, ["conv", "norm", "mixer"])
    for race in ("tiny", "middle"):
        found += _models(race, [(1, T) for T in (8, 64)], 224, ("eager",), dtype)
        found += _models(race, [(1, T) for T in (8, 48, 64, 256, 512)], 224, ("graph",), dtype)
        found += _models(race, [(8, 8)], 224, ("eager", "graph"), dtype)
    found += _tokens("middle", [(8, 2048), (1, 12288)], ("graph",), dtype)
    found += [p for p in _models("tiny", [(1, 8), (1, 64)], 224, ("compiled",), dtype) if p.mode == "infer"]
    found += _stream([8], 224, "eager", dtype) + _stream([8, 1000], 224, "graph", dtype)
    for mode, sizes in (("infer", [32, 128, 256]), ("train", [128, 256])):
        found += _chunks(mode, 512, sizes, 224, dtype)
    return found + _chunks("infer", HOUR, [256], 224, dtype, whole=False)


def _long() -> list[Point]:
    found = []
    for race in MODELS:
        found += _models(race, [(1, 2**i) for i in range(12)], 224, ("eager", "graph"), "bfloat16")
        found += _models(race, [(512 // 2**i, 2**i) for i in range(10)], 224, ("eager",), "bfloat16")
        found += _models(race, [(1, T) for T in (8, 16, 32, 64)], 448, ("eager",), "bfloat16")
    found += _stream([8, 100], 224, "eager", "bfloat16") + _stream([8, 100, 1000, 10_000], 224, "graph", "bfloat16")
    for mode in ("infer", "train"):
        for frames in (64, 512):
            found += _chunks(mode, frames, [2**i for i in range(1, 10) if 2**i <= frames], 224, "bfloat16")
        found += _chunks(mode, HOUR, [16, 64, 256], 224, "bfloat16")
    return found
