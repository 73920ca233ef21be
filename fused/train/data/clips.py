"""Clips of a folder of videos, in batches that depend on (seed, epoch, step) alone.

    folder = ClipFolder("videos/train", frames=8, size=224, train=True)
    for batch in batches(folder, 16, epoch=0, seed=0, workers=4):
        loss = F.cross_entropy(model(batch.clips), batch.labels)

The number of decoding processes, which of them decodes a file, and the step at which a training is resumed do not affect a
batch. A file that cannot be read does not end a training: another file replaces it, and the batch reports it.
"""

import os
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

from fused.io.picture import Size, height_width
from fused.io.preprocessing import Preprocessing
from fused.io.video import Times, VideoError, VideoTooShort, decode_clip
from fused.rules import check_integer, check_number
from fused.train.data.augment import Changes, erase
from fused.train.data.auto_augment import AugmentPolicy, pillow
from fused.train.data.folder_scan import is_video_name
from fused.train.data.listing import Listing, list_videos
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


class ClipFolder:
    """The clips of a folder of video files, or of a list of them; `listing.list_videos` describes `root`, `classes`,
    `separator`, `prefix` and `columns`.

    A clip has `frames` frames; None is for an image model: every image below the folder, or on the list, is one. `size` is the
    side of a square, or (height, width), in pixels. With `train`, "segments" takes a
    random frame of each of `frames` equal segments of the video, and "dense" takes frames `stride` apart from a random start.
    All frames of a clip share one random crop (`scale`: lowest and highest fraction of the area; aspect 3:4 to 4:3 of the
    size's), mirrored with probability `flip`; with probability `erased` one box of all frames is noise (`erase`). `augment`
    names an `AugmentPolicy`, such as "rand-m7-n4-mstd0.5-inc1". With `repeats` above 1 a sample is that many clips of the same
    frames, (repeats, 3, T, height, width), for which everything else is drawn anew (repeated sampling). Without `train`, a clip
    is what `Preprocessing.read` returns. `fps` and `short` are explained at `Preprocessing`; `frame_pattern`,
    such as "img_*.jpg", selects the images of folders of frames.

    With `train`, `dtype` may be torch.uint8: pixels from 0 to 255, rounded after they are resized, and not normalised, which
    take a quarter of the memory.

    The attributes `files` (sorted), `classes`, `labels`, `stated_frames` and `notes` describe the dataset, `preprocessing` its
    clips; only `sample` opens files. Raises ValueError or TypeError for arguments out of range, for a root without videos, and
    for `fps` with folders of images, which state no times; ImportError for `augment` without Pillow.
    """

    files: tuple[Path, ...]
    classes: tuple[str, ...]
    labels: tuple[int, ...]
    stated_frames: tuple[int | None, ...]
    notes: tuple[str, ...]

    def __init__(
        self, root: str | Path, frames: int | None, size: Size, *, train: bool, sampling: str = "segments", stride: int = 4,
        scale: tuple[int | float, int | float] = (0.5, 1.0), flip: int | float = 0.5, erased: int | float = 0.0, seed: int = 0,
        classes: Sequence[str] | None = None, separator: str | None = None, prefix: str | Path | None = None,
        columns: Sequence[str] | None = None, fps: int | float | None = None, short: str = "drop",
        frame_pattern: str | None = None, dtype: torch.dtype = torch.float32, augment: str | None = None, repeats: int = 1,
    ) -> None:  # fmt: skip
        if frames is not None:
            check_integer("ClipFolder", "frames", frames, 1)
        check_integer("ClipFolder", "seed", seed, 0)
        check_number("ClipFolder", "flip", flip, 0, 1)
        check_number("ClipFolder", "erased", erased, 0, 1)
        if len(scale) != 2:
            raise ValueError(f"ClipFolder: scale must be (least, most), shares of the area, got {scale!r}")
        check_number("ClipFolder", "scale's least", scale[0], 0, 1, "(]")
        check_number("ClipFolder", "scale's most", scale[1], scale[0], 1)
        if dtype not in ((torch.float32, torch.uint8) if train else (torch.float32,)):
            raise ValueError(f"ClipFolder: dtype must be torch.float32, or with train torch.uint8, got {dtype}")
        size = tuple(size) if isinstance(size, list) else size
        self.preprocessing = Preprocessing(frames, size, sampling, stride, fps, short)
        self.frames, self.size, self.train, self.dtype = frames, height_width(size), train, dtype
        check_integer("ClipFolder", "repeats", repeats, 1)
        self.erased, self.repeats = erased, repeats if train else 1
        self.policy = AugmentPolicy.parse(augment) if augment is not None else None
        if self.policy is not None:
            pillow()  # raises now rather than in a worker, at the first clip that it changes
        self.scale, self.flip, self.seed, self.frame_pattern = (scale[0], scale[1]), flip, seed, frame_pattern
        listing = self.list_files(root, classes, separator, prefix, columns, images=frames is None)
        self.files, self.labels, self.classes, self.stated_frames, self.notes = listing
        folder = next((path for path in self.files if not is_video_name(path) and os.path.isdir(path)), None) if fps else None
        if folder is not None:
            wrong = f"fps is {fps}, but {folder} is a folder of images, which states no times"
            raise ValueError(f"ClipFolder: {wrong}; allowed: fps=None, or video files only")

    def list_files(self, *where: Any, **options: Any) -> Listing:
        """Return the videos for arguments of `list_videos`."""
        return list_videos(*where, **options)

    def __len__(self) -> int:
        return len(self.files)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of a clip, (3, T, height, width), or of an image, (3, height, width); with repeats of that many."""
        repeats = (self.repeats,) if self.repeats > 1 else ()
        return (*repeats, 3, *self.size) if self.frames is None else (*repeats, 3, self.frames, *self.size)

    def sample(self, index: int, epoch: int) -> Sample:
        """Return the clip of file `index` in an epoch: the same bits for the same (seed, epoch, index), in any process.

        Raises VideoError if the file cannot be read, VideoTooShort if it is too short, IndexError for an index out of range,
        ImportError without PyAV.
        """
        path, label, stated = self.files[index], self.labels[index], self.stated_frames[index]
        if not self.train:
            return Sample(self.preprocessing.read(path, frame_pattern=self.frame_pattern, stated_frames=stated), label)
        rng = random.Random()
        changes: list[Changes] = []

        def choose(total: int, times: Times) -> list[int]:
            rng.seed(f"{self.seed} {epoch} {index}")
            return self.preprocessing.frame_numbers(path, total, times, rng)

        def prepare(image: Tensor) -> Tensor:
            if not changes:
                changes.extend(Changes.sample(rng, self.scale, self.flip, self.policy) for _ in range(self.repeats))
            return torch.stack([c.apply(image, self.size, self.dtype, self.frames is None) for c in changes], dim=1)

        frames = decode_clip(path, choose, prepare, pattern=self.frame_pattern, stated=stated)  # (3, T, repeats, ...)
        clips = []
        for clip in frames.unbind(2):
            clip = erase(clip, rng) if self.erased and rng.random() < self.erased else clip
            clips.append(clip[:, 0] if self.frames is None else clip)
        return Sample(torch.stack(clips) if self.repeats > 1 else clips[0], label)


def batches(
    dataset: ClipSource, batch_size: int, *, epoch: int, seed: int, workers: int = 0, rank: int = 0, world: int = 1,
    skip: int = 0, shuffle: bool = True, drop_last: bool = True,
) -> "Batches":  # fmt: skip
    """Return the batches of an epoch for process `rank` of `world`, without the first `skip`, whose files are not read.

    All ranks share one order of the files, shuffled by (seed, epoch). Step s takes the next world * batch_size files, and
    each rank a slice of them: two ranks with batches of 4 have the clips that one rank has with batches of 8.

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
