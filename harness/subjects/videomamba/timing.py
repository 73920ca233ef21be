"""The races of VideoMamba: against the ViT, in loops, as a stream, and in chunks."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import Tensor, nn

import fused
from harness.fixtures.functional_modules import LONG_MEMORY
from harness.judge.race import MODELS, NATIVE_KEPT, VIDEOS, Race, runs_everywhere, timed_precision
from harness.records.ceilings import Ceilings, element_bytes
from harness.records.speed import Entry, Point
from harness.subjects import mixer, norm, vit
from harness.subjects.videomamba import loop

VITS = {"tiny": "tiny", "small": "small", "middle": "base"}  # the ViT of about the same size
LETTERS = {"tiny": "Ti", "small": "S", "middle": "M"}  # of the model in its name
STREAMED = ("tiny", "small", "middle")  # sizes that are timed on a GPU
CHUNKED = ("middle",)
MAX_TOKENS = {"fused:torch": 1569, "reference": 12_545}  # 8 frames and 64: what the paper compares goes no further
HOUR = 3600  # frames, one a second


def races() -> list[Race]:
    """Return a race against the ViT for each size, and the races of loops, streams and chunks."""

    def against_vit(size: str) -> Race:
        contenders = ("videomamba", size), ("vit", VITS[size])
        return Race(
            size, MODELS, points=lambda grid: model_points(size, grid), contenders=contenders, runs=runs_against_vit,
            title=f"VideoMamba-{LETTERS[size]}",
        )  # fmt: skip

    def of_videos(race: Race, points: Callable[[str], list[Point]], sizes: tuple[str, ...]) -> Race:
        contenders = tuple(("videomamba", size) for size in dict.fromkeys(("tiny", *sizes)))
        runs = lambda entry, point, grid: runs_on_videos(entry, grid, sizes)  # noqa: E731
        return replace(race, points=points, contenders=contenders, runs=runs, needs=("initial_state",))

    stream = Race(
        "stream", VIDEOS, checks=("chunks", "stream"), licence=stream_licence, maker="harness.bench.streaming:make",
        fewest=samples_for_percentile, title="a stream",
    )  # fmt: skip
    chunks = Race("chunks", VIDEOS, title="a video in chunks", checks=("forward_chunked",), licence=chunks_licence)
    vits = [against_vit(size) for size in VITS]
    vits += [with_memory(vits[-1], option) for option in ("fresh", LONG_MEMORY)]
    return [*vits, loop.race(), of_videos(stream, stream_points, STREAMED), of_videos(chunks, chunks_points, CHUNKED)]


def with_memory(race: Race, option: str) -> Race:
    """Return a race with steps of one kind, see `functional_modules.delta_bias`, at the lengths around where the ViT is met."""
    name = f"{race.name}-{option}"

    def points(grid: str) -> list[Point]:
        return around_meeting(name, (32, 40, 48, 64)) if grid == "full" else []

    def licensed(dtype: str) -> tuple[str, ...]:
        return *short_and_long(option, dtype), *vit.licence(dtype)

    return replace(race, name=name, points=points, licence=licensed, options=(option,), variant=option.replace("-", " "))


def around_meeting(race: str, frames: Sequence[int]) -> list[Point]:
    """Return clips of so many frames, and tokens without a class token, whose even lengths attention can like better."""
    points = clip_points(race, [(1, T) for T in frames], 224, ("graph",))
    points += token_points(race, [(1, 196 * T) for T in (32, 40, 48, 64)], ("graph",))
    return [p for p in points if p.mode == "infer"]


def runs_against_vit(entry: Entry, point: Point, grid: str) -> bool:
    """Return whether an entry is timed at a point. PyTorch's own scan on a GPU and naive attention are no rivals for speed:
    they are timed eagerly, not captured or compiled, in grid `full` up to MAX_TOKENS."""
    most = MAX_TOKENS.get(entry.implementation)
    if most is None:
        return runs_everywhere(entry, point, grid)
    return point.way == "eager" and (grid != "full" or point.tokens <= most)


def runs_on_videos(entry: Entry, grid: str, sizes: tuple[str, ...]) -> bool:
    """Return whether an entry is timed: the fastest backend, in these sizes; in grid `cpu` the one that is there, in the
    smallest. `native_kept` does not differ here from `native`."""
    if entry.implementation == NATIVE_KEPT:
        return False
    return entry.variant == "tiny" if grid == "cpu" else entry.variant in sizes and entry.implementation != "fused:torch"


def samples_for_percentile(point: Point) -> int:
    """Return the samples that a 99th percentile takes, or where calls are slow a part of that."""
    return 100 if point.way == "graph" else 20


def licence(dtype: str) -> tuple[str, ...]:
    """Return one case, and in bfloat16 one of as many tokens as take the native scan's other path."""
    return short_and_long("", dtype)


def short_and_long(option: str, dtype: str) -> tuple[str, ...]:
    """Return the cases of a licence, the long one with inputs of a kind; "" for the usual ones."""
    short, long = f"B2-T8-S64-D192-L129-{timed_precision(dtype)}", "B1-T42-S224-D32-L8233"
    if dtype != "bfloat16":
        return (short,)
    return short, "-".join(filter(None, [long, option, "readout=tokens-infer", timed_precision(dtype)]))


def stream_licence(dtype: str) -> tuple[str, ...]:
    """Return a stretched video, and one of which every tubelet is judged by itself."""
    return (
        f"B1-T4-S64-D192-L65-causal-state-readout=mean-stretch-video-{timed_precision(dtype)}",
        f"B2-T4-S32-D32-L17-causal-state-readout=tokens-tubelet2-{timed_precision(dtype)}",
    )


def chunks_licence(dtype: str) -> tuple[str, ...]:
    """Return the cases of 129 tokens, and in bfloat16 of 769, where native kernels split the time of a chunk."""
    return (f"B[12]-T*-S[61]*-D192-L[17][26]9-{timed_precision(dtype)}",)


def model_points(race: str, grid: str) -> list[Point]:
    """Return the points of a race against the ViT."""
    if grid == "cpu":
        return clip_points(race, [(1, 1), (1, 4), (1, 16), (1, 64)], 64, ("eager",), "float32") if race == "tiny" else []
    if grid == "long":
        return [
            *clip_points(race, [(1, 2**i) for i in range(12)], 224, ("eager", "graph")),
            *clip_points(race, [(512 // 2**i, 2**i) for i in range(10)], 224, ("eager",)),
            *clip_points(race, [(1, T) for T in (8, 16, 32, 64)], 448, ("eager",)),
        ]
    if race == "small":
        return []
    found = clip_points(race, [(1, T) for T in (8, 64)], 224, ("eager",))
    found += clip_points(race, [(1, T) for T in (8, 48, 64, 256, 512)], 224, ("graph",))
    found += clip_points(race, [(8, 8)], 224, ("eager", "graph"))
    if race == "middle":
        return found + around_meeting(race, (32, 40)) + token_points(race, [(8, 2048), (1, 12288)], ("graph",))
    return found + [p for p in clip_points(race, [(1, 8), (1, 64)], 224, ("compiled",)) if p.mode == "infer"]


def clip_points(
    race: str, clips: list[tuple[int, int]], side: int, ways: tuple[str, ...], dtype: str = "bfloat16"
) -> list[Point]:
    """Return the points of (batch, frames) pairs, forward and training, in every way."""
    found = []
    for mode in ("infer", "train"):
        for way in ways:
            for B, T in clips:
                sizes = {"B": B, "T": T, "S": side, "L": 1 + T * (side // 16) ** 2}
                found.append(Point(race, tuple(sizes.items()), mode, way, dtype))
    return found


def token_points(race: str, sizes: list[tuple[int, int]], ways: tuple[str, ...], dtype: str = "bfloat16") -> list[Point]:
    """Return the points of blocks and final norm only: a clip's length is odd by its class token, and upstream's scan is at its
    best at multiples of 2048."""
    modes = ("infer", "train")
    return [Point(race, (("B", B), ("L", L)), mode, way, dtype) for mode in modes for way in ways for B, L in sizes]


def stream_points(grid: str) -> list[Point]:
    """Return one more frame after A frames."""

    def after(frames: list[int], side: int, way: str, dtype: str = "bfloat16") -> list[Point]:
        sizes = ("B", 1), ("T", 1), ("S", side), ("L", (side // 16) ** 2)
        return [Point("stream", (*sizes, ("A", n)), "infer", way, dtype) for n in frames]

    if grid == "cpu":
        return after([4, 32], 64, "eager", "float32")
    if grid == "full":
        return after([8], 224, "eager") + after([8, 1000], 224, "graph")
    return after([8, 100], 224, "eager") + after([8, 100, 1000, 10_000], 224, "graph")


def chunks_points(grid: str) -> list[Point]:
    """Return a video in chunks of F frames of several lengths, and, where it fits, as one."""

    def of(mode: str, frames: int, chunks: list[int], side: int = 224, dtype: str = "bfloat16") -> list[Point]:
        sizes = ("B", 1), ("T", frames), ("S", side), ("L", 1 + frames * (side // 16) ** 2)
        found = [Point("chunks", (*sizes, ("F", n)), mode, "chunked", dtype) for n in chunks]
        at_once = Point("chunks", sizes, mode, "eager" if mode == "infer" else "checkpointed", dtype)
        return [*found, at_once] if grid == "long" or frames != HOUR else found

    if grid == "cpu":
        return [p for mode in ("infer", "train") for p in of(mode, 4, [1, 2], 64, "float32")]
    if grid == "full":
        return of("infer", 512, [32, 128, 256]) + of("train", 512, [128, 256]) + of("infer", HOUR, [256])
    found = []
    for mode in ("infer", "train"):
        for frames in (64, 512):
            found += of(mode, frames, [2**i for i in range(1, 10) if 2**i <= frames])
        found += of(mode, HOUR, [16, 64, 256])
    return found


def network(point: Point, entry: Entry) -> nn.Module:
    """Return the classifier of the entry's size: for the point's clips, or causal with a running mean for a stream."""
    clips = {"img_size": point["S"], "num_frames": point["T"]} if point.clips else {}
    config = getattr(fused.VideoMambaConfig, entry.variant)(**clips, num_classes=10, drop_path_rate=0.0)
    if point.race == "stream":
        config = replace(config, num_frames=64, bimamba=False, readout="mean")
    if point.way == "checkpointed":
        config = replace(config, use_checkpoint=True, checkpoint_num=config.depth)
    return fused.VideoMamba(config, backend=entry.implementation.removeprefix("fused:"))


def blocks(network: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return the model's blocks and final norm."""
    assert isinstance(network, fused.VideoMamba)
    return lambda tokens: network.encode(tokens)[0]


def bound(point: Point, variant: str, ceilings: Ceilings) -> float:
    """Return the seconds of all layers, a mixer and a norm each; a stream has one direction."""
    config = getattr(fused.VideoMambaConfig, variant)()
    tokens, D, size, train = point.tokens, config.embed_dim, element_bytes(point.dtype), point.mode == "train"
    directions = 1 if point.race == "stream" else 2
    layer = mixer.seconds(tokens, D, size, train, ceilings, directions) + norm.seconds(tokens, D, size, train, ceilings)
    return config.depth * layer
