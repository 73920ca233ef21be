"""A race: the entries that are timed against each other, and the points."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from harness.records.speed import Entry, Point

NATIVE_KEPT = "fused:native_kept"  # native but for the backward pass of a mixer
KINDS = "operators", "models", "loops", "videos", "data"  # of races, in the order of their timing
OPERATORS, MODELS, LOOPS, VIDEOS, DATA = KINDS

Shape = tuple[int, int, int]  # B, E, L
CPU_SHAPES: tuple[Shape, ...] = ((1, 384, 197), (1, 384, 785))
FULL_SHAPES: tuple[Shape, ...] = ((8, 384, 1569), (8, 1152, 1569), (1, 1152, 12545))


def runs_everywhere(entry: Entry, point: Point, grid: str) -> bool:
    """Return whether an entry is timed at a point: `native_kept` differs only where a whole mixer has a backward pass."""
    return entry.implementation != NATIVE_KEPT or point.mode == "train"


def few_samples(point: Point) -> int:
    """Return the number of samples that is enough for a median."""
    return 3


@dataclass(frozen=True)
class Race:
    """`contenders` are (subject, size of the model) pairs; an operator's size is empty. Races of a kind are timed by `order`.

    `checks` license a timing, on the cases that `licence(dtype)` names; without them these are `forward` and `backward`, and
    the cases are the subject's. `needs` names abilities that a contender must declare. `fewest` is the number of samples
    below which a spent budget is no reason to stop, `slowest` the seconds that a call may take in any case. `options` are
    those of the timed case, an operator's or a model's; implementations in `channels_first` get tensors whose memory is (B,
    E, L), so that they are not timed with a transposition which their own models do not make. `maker` builds the timed call,
    see `Entry`. A race that is not timed `by_default` is timed where it is named.

    `title` is what pages call the race in a sentence, such as "the scan". `words` says the sizes of a point of operators, which
    stand in one table. `variant` is how a race differs from the one of its title, such as "long memory".
    """

    name: str
    kind: str = OPERATORS
    order: int = 100
    points: Callable[[str], list[Point]] = lambda grid: []
    contenders: tuple[tuple[str, str], ...] = ()
    checks: tuple[str, ...] = ()
    licence: Callable[[str], tuple[str, ...]] | None = None
    runs: Callable[[Entry, Point, str], bool] = runs_everywhere
    maker: str = "harness.bench.workloads:make"
    needs: tuple[str, ...] = ()
    fewest: Callable[[Point], int] = few_samples
    slowest: float = 0.0
    options: tuple[str, ...] = ()
    channels_first: tuple[str, ...] = ()
    by_default: bool = True
    title: str = field(kw_only=True)
    words: Callable[[Mapping[str, int]], str] | None = field(default=None, kw_only=True)
    variant: str = field(default="", kw_only=True)

    def __post_init__(self) -> None:
        if self.kind == OPERATORS and self.words is None:
            raise TypeError(f"race {self.name!r} has no words; allowed: a function that says a point's sizes in pages")


def rows(sizes: Mapping[str, int]) -> str:
    """Return the clips and tokens of a point in words."""
    return f"{sizes['B']} x {sizes['L']:,} tokens"


def operator_points(
    race: str, grid: str, sizes: Callable[[int, int, int], dict[str, int]], **shapes: tuple[Shape, ...]
) -> list[Point]:
    """Return the points of an operator, forward and training; `sizes(B, E, L)` names its sizes.

    `shapes` are those of grids where the operator is timed at others than the usual ones.
    """
    usual = {"cpu": CPU_SHAPES, "full": FULL_SHAPES} | shapes
    dtype = "float32" if grid == "cpu" else "bfloat16"
    named = [tuple(sizes(*shape).items()) for shape in usual.get(grid, ())]
    return [Point(race, dims, mode, dtype=dtype) for dims in named for mode in ("infer", "train")]


def timed_precision(dtype: str) -> str:
    """Return the last words of the case of a module in the precision in which it is timed: parameters in the dtype too."""
    return dtype if dtype == "float32" else f"cast-{dtype}"
