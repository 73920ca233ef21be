"""Batches of clips that depend on (seed, epoch, step) alone.

    folder = ClipFolder("videos/train", frames=8, size=224, train=True)
    for batch in batches(folder, 16, epoch=0, seed=0, workers=4):
        loss = F.cross_entropy(model(batch.clips), batch.labels)

The number of decoding processes, which of them decodes a file, and the step at which a training is resumed do not affect a
batch. A file that cannot be read does not end a training: another file replaces it, and the batch reports it.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fused.io.video import VideoError, VideoTooShort
from fused.rules import check_integer
from fused.train.interrupt import blocked_signals, leave_signals_to_parent

MAX_CONSECUTIVE_FAILURES = 32  # more than single bad files explain: the path is wrong, or the disk is gone
MAX_ERRORS_SHOWN = 3


class UnreadableFiles(RuntimeError):
    """The error for too many consecutive files that cannot be read; the message names some and says why."""

    def __init__(self, message: str) -> None:
        # PyTorch raises a worker's exception again with the worker's traceback, up to the exception's name, before its message
        super().__init__(message.rpartition(f"{type(self).__name__}: ")[2].strip())


class SampleTooLong(VideoError):
    """The error for a sample of more tokens than a row may have."""


class BadFile(NamedTuple):
    """A file that gave no clip."""

    path: str  # as the dataset lists it
    sentence: str  # names the file and says what is wrong with it
    too_short: bool  # whether the file is intact and has too few frames
    too_long: bool = False  # whether it is intact and gives more tokens than a row may have


@dataclass(frozen=True)
class Batch:
    """Clips of `batches`. In evaluation there may be fewer than the batch size, or none."""

    # normalised float32, or bytes: see `ClipFolder`; in an evaluation of several views (B, V, 3, T, H, W), of images without T
    clips: Float[Tensor, "B ..."] | UInt8[Tensor, "B ..."]
    labels: Int[Tensor, " B"]  # int64; -1 for every clip of a dataset without classes
    indices: Int[Tensor, " B"]  # int64, into the dataset's files
    bad_files: tuple[BadFile, ...]  # the files that gave no clip for this batch

    @property
    def bad(self) -> tuple[str, ...]:
        """A sentence for each file that gave no clip for this batch, which names it and says what is wrong with it."""
        return tuple(file.sentence for file in self.bad_files)

    def pin_memory(self) -> "Batch":
        """Return the same batch in pinned memory, from which copies to a GPU overlap with computation."""
        return Batch(self.clips.pin_memory(), self.labels.pin_memory(), self.indices.pin_memory(), self.bad_files)


class Sample(NamedTuple):
    """One clip of a `ClipSource`."""

    clip: Tensor  # (3, T, height, width) float32, normalised by ImageNet's mean and standard deviation; or uint8
    label: int  # -1 in a dataset without classes


@runtime_checkable
class ClipSource(Protocol):
    """The source of clips for `batches`. Worker processes hold copies of it."""

    files: tuple[Path, ...]
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of a clip, by which an empty batch is made."""

    def __len__(self) -> int: ...

    def sample(self, index: int, epoch: int) -> Sample:
        """Return the clip of file `index` in an epoch. Raise VideoError for a file that gives none."""


@runtime_checkable
class Collates(Protocol):
    """A source whose samples are no clips of one shape: it makes batches of them itself."""

    def collate(self, samples: Sequence[Any], indices: Sequence[int], bad: Sequence[BadFile]) -> Any:
        """Return the batch of these samples."""


def batches(
    dataset: ClipSource, batch_size: int, *, epoch: int, seed: int, workers: int = 0, rank: int = 0, world: int = 1,
    skip: int = 0, shuffle: bool = True, drop_last: bool = True,
) -> "Batches":  # fmt: skip
    """Return the batches of an epoch for process `rank` of `world`, without the first `skip`, whose files are not read.

    All ranks share one order of the files, with `shuffle` a random one that (seed, epoch) decides. Step s takes the next world
    * batch_size files, and each rank a slice of them: two ranks with batches of 4 have the clips that one rank has with batches
    of 8.

    With `drop_last`, for training, every batch is full. The files left over at the end of the epoch are dropped. A file that
    cannot be read is replaced by the next readable one after this step's files in the order; the ranks take replacements in
    turn. After 32 consecutive failures UnreadableFiles, a RuntimeError, is raised. A `ClipFolder` with `repeats` gives that
    many times more clips: first one of each file, then the second of each.

    Without `drop_last`, for evaluation, every readable file occurs exactly once over all ranks. All ranks have equally many
    steps, and the last batch is divided evenly, so that it may be empty on some ranks.

    `workers` processes decode in advance (0: the calling process decodes). They leave SIGINT and SIGTERM, which a terminal and
    schedulers send to all processes of a group, to the calling process; it ends them, and they end when it is gone. If one
    dies, PyTorch's RuntimeError names it. PyTorch's default generators are not used. Where CUDA is available, batches are in
    pinned memory.

    Raises ValueError or TypeError for arguments out of range, and for a dataset with too few files for one step.
    """
    check_integer("batches", "batch_size", batch_size, 1)
    check_integer("batches", "epoch", epoch, 0)
    check_integer("batches", "seed", seed, 0)
    check_integer("batches", "workers", workers, 0)
    check_integer("batches", "world", world, 1)
    check_integer("batches", "rank", rank, 0, world - 1)
    order = list(range(len(dataset)))
    if shuffle:
        random.Random(f"{seed} {epoch}").shuffle(order)
    steps, remainder = divmod(len(order), batch_size * world)
    if not drop_last and remainder:
        steps += 1
    if not steps:
        size = f"{len(order)}; a step takes batch_size * world = {batch_size} * {world}"
        raise ValueError(f"batches: dataset must have files for one step, got {size} (drop_last=False takes fewer)")
    check_integer("batches", "skip", skip, 0, steps)
    rank_steps = _RankSteps(dataset, epoch, torch.tensor(order), batch_size * world, rank, world, replace=drop_last)
    return Batches(rank_steps, range(skip, steps), workers)


class Batches:
    """An iterable of `Batch`; its length is the number of steps. Each iteration starts worker processes of its own."""

    def __init__(self, rank_steps: "_RankSteps", steps: range, workers: int) -> None:
        self._rank_steps, self._steps, self._workers = rank_steps, steps, workers

    def __len__(self) -> int:
        return len(self._steps)

    def __iter__(self) -> Iterator[Batch]:
        loader = DataLoader(
            self._rank_steps,
            batch_size=None,
            sampler=self._steps,
            num_workers=self._workers,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=leave_signals_to_parent,
            generator=torch.Generator(),  # by default the workers' seeds are drawn from PyTorch's default generator
        )
        with blocked_signals():  # until a worker has begun to leave them to this process
            return iter(loader)


@dataclass(frozen=True)
class _RankSteps(Dataset):
    """A map from step to batch, for one rank and one epoch; worker processes hold copies of it."""

    dataset: ClipSource
    epoch: int
    order: Tensor  # file indices; workers share a tensor's memory, but copy a list as its reference counts change
    files_per_step: int  # over all ranks
    rank: int
    world: int
    replace: bool  # whether other files replace unreadable ones

    def __getitem__(self, step: int) -> Any:
        """Return this rank's batch of a step, a `Batch` unless the dataset makes batches itself.

        Raise UnreadableFiles after too many consecutive failures.
        """
        files = self._rank_files(step)
        samples: list[Sample] = []
        indices: list[int] = []
        bad: dict[int, BadFile] = {}
        failures = 0  # consecutive ones
        for index in chain(files, self._replacements(step) if self.replace else ()):
            if len(samples) == len(files):
                break
            if self.replace and failures == MAX_CONSECUTIVE_FAILURES:
                errors = "; ".join(file.sentence for file in list(bad.values())[:MAX_ERRORS_SHOWN])
                raise UnreadableFiles(f"batches: none of {len(bad)} files can be read: {errors}")
            failures += 1
            if index in bad:  # the replacements have come round to a file that was tried before
                continue
            try:
                samples.append(self.dataset.sample(index, self.epoch))
            except VideoError as error:
                path = str(self.dataset.files[index])
                bad[index] = BadFile(path, str(error), isinstance(error, VideoTooShort), isinstance(error, SampleTooLong))
            else:
                indices.append(index)
                failures = 0
        if isinstance(self.dataset, Collates):
            return self.dataset.collate(samples, indices, tuple(bad.values()))
        empty = torch.empty(0, *self.dataset.shape, dtype=self.dataset.dtype)
        clips = torch.stack([s.clip for s in samples]) if samples else empty
        labels = torch.tensor([s.label for s in samples], dtype=torch.int64)
        numbers, repeats = torch.tensor(indices, dtype=torch.int64), getattr(self.dataset, "repeats", 1)
        if repeats > 1:  # clips of the same file stand apart, as neighbours are mixed
            clips, labels, numbers = clips.transpose(0, 1).flatten(0, 1), labels.repeat(repeats), numbers.repeat(repeats)
        return Batch(clips, labels, numbers, tuple(bad.values()))

    def _rank_files(self, step: int) -> list[int]:
        """Return this rank's file indices of a step; an incomplete last step is divided evenly."""
        step_files = self.order[step * self.files_per_step : (step + 1) * self.files_per_step]
        size = len(step_files)
        return step_files[self.rank * size // self.world : (self.rank + 1) * size // self.world].tolist()

    def _replacements(self, step: int) -> Iterator[int]:
        """Yield, without end, every world-th file index after the step's files in the order, which wraps around."""
        for position in count((step + 1) * self.files_per_step + self.rank, self.world):
            yield int(self.order[position % len(self.order)])
