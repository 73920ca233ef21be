"""The members of a subject.

A subject is a module in `harness/subjects/`, or a package there. Its name is the file's, its title the first sentence of its
docstring. It must have all that `Subject` lists. Each of the other protocols is optional: a subject that has its members is
asked, or timed, in more ways. Nothing else in the harness lists subjects.

To be timed, a subject gives `races`; whoever takes part in a race needs `licence` and `bound` (`Timed`).
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from harness.judge.case import Case
from harness.judge.implementation import Implementation
from harness.judge.race import Race
from harness.records.ceilings import Ceilings
from harness.records.finding import Finding
from harness.records.speed import Entry, Point

Call = Callable[..., Any]  # `Implementation.call`
Named = dict[str, Tensor]
Cuts = tuple[int, ...]  # the units at which chunks start; the first is 0


@runtime_checkable
class Subject(Protocol):
    """An operator or a module, in several implementations."""

    __name__: str
    __doc__: str | None

    def cases(self, grid: str) -> list[Case]:
        """Return the points of a grid: "smoke", "full" or "long"."""

    def implementations(self) -> list[Implementation]:
        """Return what can run it, `reference` first."""

    def draw(self, case: Case, seed: int) -> Named:
        """Return the leaves, which are inputs and parameters, by name: float64 on the CPU."""

    def precise(self, case: Case) -> set[str]:
        """Return the names of leaves that are float32 at least, whatever the case's dtype."""

    def evaluate(self, call: Call, case: Case, leaves: Named) -> Named:
        """Return the outputs of one implementation by name."""

    def no_cotangent(self, case: Case) -> set[str]:
        """Return the names of outputs that get no cotangent."""

    def output_values(self, case: Case) -> int:
        """Return how many values of one output the rounding errors average over; with few, more seeds are pooled."""

    def steps(self, case: Case) -> float:
        """Return the sequential scan steps of one forward: the cost of the truth."""


@runtime_checkable
class HasTokens(Protocol):
    """A subject some of whose leaves and outputs have an axis of time, so that a failure is located there.

    Where all of them have L tokens on it, the shortest failing prefix is looked for too: `evaluate` must take leaves that were
    cut, with a case of that L.
    """

    def time_axes(self, case: Case) -> dict[str, int]:
        """Return the axis of tokens, or frames, of leaves and outputs that have one, by name."""


@runtime_checkable
class HasEdges(Protocol):
    """A subject that knows how its kernels divide the tokens, so that a failure at an edge is named."""

    def edges(self, case: Case, backend: str, device: str) -> dict[str, Collection[int]]:
        """Return the tokens at which the parts of a backend's kernel begin, by the parts' name, such as "tiles of 16"."""


@runtime_checkable
class Chunkable(Protocol):
    """A subject that can be cut in time."""

    def chunked(self, call: Call, case: Case, leaves: Named, cuts: Cuts) -> Named:
        """Return what `evaluate` returns, computed chunk by chunk through the state."""

    def time_axes(self, case: Case) -> dict[str, int]:
        """Return the axis of tokens of leaves and outputs that have one, by name."""

    def num_units(self, case: Case) -> int:
        """Return the number of units between which the sequence can be cut: tubelets of a model's video, else tokens."""


@runtime_checkable
class ChunkedModel(Protocol):
    """A model of whole videos that has `forward_chunked`."""

    def forward_chunked(self, call: Call, case: Case, leaves: Named, frames: int) -> Named:
        """Return what `evaluate` returns, by the model's `forward_chunked` with chunks of `frames`."""

    def chunk_frames(self, case: Case) -> list[int]:
        """Return lengths of chunks to try, in frames; none where chunks are not offered."""


@runtime_checkable
class FrameByFrame(Protocol):
    """A classifier that takes a video frame by frame."""

    def frame_by_frame(self, call: Call, case: Case, leaves: Named) -> Named:
        """Return the logits that `evaluate` returns, by `FrameStream`."""

    def cut_by_tubelets(self, case: Case) -> bool:
        """Return whether the case is of a video that is cut."""


@runtime_checkable
class BatchIndependent(Protocol):
    """A subject that promises that the clips of a batch do not influence each other."""

    def per_clip(self, case: Case) -> set[str]:
        """Return the names of leaves that have an entry per clip on axis 0, as all outputs do."""


@runtime_checkable
class HasModule(Protocol):
    """A subject that is a module with parameters."""

    def build(self, call: Call, case: Case) -> nn.Module:
        """Return the module of a case."""


@runtime_checkable
class DrawsNumbers(Protocol):
    """A module that can draw random numbers in training."""

    def random_option(self) -> str:
        """Return the option of a case whose module draws them."""


@runtime_checkable
class HasSpecialCases(Protocol):
    """A subject with cases that only one check asks: their options contain "for=CHECK". `draw` draws these too."""

    def special_cases(self, check: str, grid: str) -> list[Case]:
        """Return the cases of a grid that only this check asks."""


@runtime_checkable
class HasCostlyChecks(Protocol):
    """A subject that selects cases for checks which are not asked everywhere."""

    def costly_checks(self, case: Case) -> set[str]:
        """Return which of the checks `compile`, `device` and `writes` ask this case."""


@runtime_checkable
class HasInvariants(Protocol):
    """A subject whose equation has symmetries, which the check `invariants` asks for in cases of its own."""

    def invariants(self, case: Case) -> Mapping[str, Callable[[Call, Case, Named], tuple[Named, Named]]]:
        """Return the relations of `instruments.symmetries` that hold in a case, by name."""


@runtime_checkable
class HasChannels(Protocol):
    """An operator whose channels do not influence each other, so that `extremes` can judge every other channel by itself."""

    def channel_axes(self) -> dict[str, int]:
        """Return the axis of channels of leaves and outputs that have one, by name."""


@runtime_checkable
class Periodic(Protocol):
    """An operator that can forget all earlier tokens, so that a repeated input has a known output."""

    def repeat(self, leaves: Named, count: int) -> Named:
        """Return the leaves of `count` periods, without memory for what is the same in all of them."""


@runtime_checkable
class RestrictedExpansion(Protocol):
    """A subject that is not asked for tensors expanded along every axis."""

    def expanded_axes(self) -> tuple[int, ...]:
        """Return the axes along which the check `strides` expands leaves."""


@runtime_checkable
class Trainable(Protocol):
    """A model that the check `convergence` trains."""

    def training_title(self) -> str:
        """Return the task in a few words, for plots."""

    def learning_rate(self) -> float:
        """Return the rate of SGD with momentum, at which the loss falls by much, and without leaps."""

    def training_target(self, call: Call, case: Case, clip: Tensor) -> Tensor:
        """Return the target of every clip; `clip` is (B, 3, T, S, S), float64 on the CPU."""

    def training_losses(self, model: nn.Module, case: Case, clip: Tensor, rows: list[int], target: Tensor) -> Tensor:
        """Return one loss a clip, in at least float32; `clip` and `target` are the `rows` of all clips and targets."""


@runtime_checkable
class TrainableByCommand(Protocol):
    """A model that the check `processes` trains by the command of `fused.train`."""

    def training_words(self, drawn: bool) -> tuple[str, ...]:
        """Return the words of the task; where not `drawn`, nothing random may depend on how clips spread over processes."""

    def first_steps(self) -> int:
        """Return the number of steps after which the first gradient is seen."""

    def needs_teacher(self) -> bool:
        """Return whether the task learns from a teacher's features."""


@runtime_checkable
class HasLayouts(Protocol):
    """A subject for which operators in other layouts can be added: `--with SUBJECT:NAME=module:callable@LAYOUT`."""

    LAYOUTS: Mapping[str, Callable[[Call], Call]]


@runtime_checkable
class ReadsVideos(Protocol):
    """A subject whose implementations read clips from video files."""

    def frame_findings(self, implementation: Implementation, case: Case, clip: Tensor) -> list[Finding]:
        """Return how a clip differs from the frames of a full decode."""


@runtime_checkable
class HasRaces(Protocol):
    """A subject that is timed."""

    def races(self) -> list[Race]:
        """Return the races in which it is timed, with their points."""


@runtime_checkable
class Timed(Protocol):
    """A subject that may take part in a race."""

    def licence(self, dtype: str) -> tuple[str, ...]:
        """Return patterns of the reduced cases that must pass parity, in the precision in which it is timed."""

    def bound(self, point: Point, variant: str, ceilings: Ceilings) -> float:
        """Return the seconds that the hardware needs at least for one call."""


@runtime_checkable
class SelectsContenders(Protocol):
    """A subject that selects its timed implementations; of others all but the reference are timed."""

    def contenders(self, kernel: str | None) -> list[Implementation]:
        """Return the timed implementations; `kernel` is the box's fastest for softmax attention, None for all that might be."""


@runtime_checkable
class TimedModel(Protocol):
    """A model that is timed."""

    def network(self, point: Point, entry: Entry) -> nn.Module:
        """Return the model of the entry's size for the point's clips, or for its tokens."""

    def blocks(self, network: nn.Module) -> Callable[[Tensor], Tensor]:
        """Return the model's blocks and final norm as a function of tokens (B, L, D)."""
