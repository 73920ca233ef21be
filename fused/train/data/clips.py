"""Clips of a folder of videos, in batches that depend on (seed, epoch, step) alone.

    folder = ClipFolder("videos/train", frames=8, size=224, train=True)
    for batch in batches(folder, 16, epoch=0, seed=0, workers=4):
        loss = F.cross_entropy(model(batch.clips), batch.labels)

How many processes read, which of them reads what, and where a training that was stopped goes on have no part in it. A file
that cannot be read never ends a training: another takes its place, and the batch says so.
"""

import random
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fused.io.video import VideoError, central, count_frames, decode, sample
from fused.rules import check_integer, check_number
from fused.runtime.checks import check_choice
from fused.train.data.augment import Crop, dense_frames, segment_frames
from fused.train.data.listing import list_videos

SAMPLINGS = ("segments", "dense")
MOST_BAD = 32  # so many tries one after another are no accident: a wrong path, a disk that is gone
SHOWN = 3  # files that an error names


class Unreadable(RuntimeError):
    """Too many files one after another cannot be read; the message says why."""

    def __init__(self, message: str) -> None:  # of a worker process it comes back behind that one's traceback
        super().__init__(message.rpartition(f"{type(self).__name__}: ")[2].strip())


@dataclass(frozen=True)
class Batch:
    """Clips of `batches`. In evaluation there may be fewer than asked for, or none."""

    clips: Float[Tensor, "B 3 T H W"]  # float32, normalised by ImageNet's mean and standard deviation
    labels: Int[Tensor, " B"]  # int64; -1 everywhere where there are no classes
    indices: Int[Tensor, " B"]  # int64: which of the dataset's files
    bad: tuple[str, ...]  # a sentence for each file that could not be read for this batch, which names it

    def pin_memory(self) -> "Batch":
        """The same batch in pinned memory, from which copies to a GPU run beside its work."""
        return Batch(self.clips.pin_memory(), self.labels.pin_memory(), self.indices.pin_memory(), self.bad)


class Sample(NamedTuple):
    """One clip of a `ClipFolder`."""

    clip: Tensor  # (3, T, size, size) float32, normalised
    label: int  # -1 where there are no classes


class ClipFolder:
    """The clips of a folder of video files, or of a list of them: see `listing.list_videos`, also for `classes`.

    A clip has `frames` frames of (size, size) pixels. With `train`, "segments" takes a random frame of each of as many equal
    segments of the video, "dense" frames `stride` apart from a random start; of all of them the same random part (`scale` of
    the area, sides of 3:4 to 4:3), mirrored with probability `flip`. Without, they are the middle frames and the middle
    square: what `fused.io.video.read_clip` gives, or the middle start of "dense".

    `files` (sorted), `classes` and `labels` say what was found; files are opened by `sample` alone. Raises ValueError or
    TypeError for arguments out of range, and a root that holds no videos.
    """

    files: tuple[Path, ...]
    classes: tuple[str, ...]
    labels: tuple[int, ...]

    def __init__(
        self, root: str | Path, frames: int, size: int, *, train: bool, sampling: str = "segments", stride: int = 4,
        scale: tuple[int | float, int | float] = (0.5, 1.0), flip: int | float = 0.5, seed: int = 0,
        classes: Sequence[str] | None = None,
    ) -> None:  # fmt: skip
        for name, value, least in (("frames", frames, 1), ("size", size, 1), ("stride", stride, 1), ("seed", seed, 0)):
            check_integer("ClipFolder", name, value, least)
        check_choice("ClipFolder", "sampling", sampling, SAMPLINGS)
        check_number("ClipFolder", "flip", flip, 0, 1)
        if len(scale) != 2:
            raise ValueError(f"ClipFolder: scale must be (least, most), shares of the area, got {scale!r}")
        check_number("ClipFolder", "scale's least", scale[0], 0, 1, "(]")
        check_number("ClipFolder", "scale's most", scale[1], scale[0], 1)
        self.frames, self.size, self.train, self.sampling, self.stride = frames, size, train, sampling, stride
        self.scale, self.flip, self.seed = (scale[0], scale[1]), flip, seed
        self.files, self.labels, self.classes = list_videos(root, classes)

    def __len__(self) -> int:
        return len(self.files)

    def sample(self, index: int, epoch: int) -> Sample:
        """File `index` as it is in this epoch: the same bits for the same (seed, epoch, index), in any process.

        Raises VideoError if the file cannot be read or is too short, IndexError if there is none, ImportError without PyAV.
        """
        path = self.files[index]
        chance = random.Random(f"{self.seed} {epoch} {index}") if self.train else None
        numbers = self._numbers(path, chance)
        crop = Crop.draw(chance, self.scale, self.flip) if chance else None
        clip = torch.empty(3, self.frames, self.size, self.size)
        for i, image in enumerate(decode(path, numbers)):
            clip[:, i] = crop.cut(image, self.size) if crop else central(image, self.size)
        return Sample(clip, self.labels[index])

    def _numbers(self, path: Path, chance: random.Random | None) -> list[int]:
        """Which frames, ascending."""
        total = count_frames(path)
        if self.sampling == "dense":
            needed = f"{(self.frames - 1) * self.stride + 1} frames, {self.frames} that are {self.stride} apart"
            numbers = dense_frames(total, self.frames, self.stride, chance)
        else:
            needed = f"{self.frames} frames"
            numbers = segment_frames(total, self.frames, chance) if chance else sample(total, self.frames)
        if not numbers:
            raise VideoError(path, f"too short: it has {total} frames", f"allowed are videos of at least {needed}")
        return numbers


def batches(
    dataset: ClipFolder, batch_size: int, *, epoch: int, seed: int, workers: int = 0, rank: int = 0, world: int = 1,
    skip: int = 0, shuffle: bool = True, drop_last: bool = True,
) -> "Batches":  # fmt: skip
    """The batches of an epoch, from number `skip` on, for process `rank` of `world`; what is skipped is not read.

    All ranks share one order of the files, shuffled by (seed, epoch): step s takes the next world * batch_size of it, each
    rank its part, so that two ranks with batches of 4 see together what one sees with batches of 8.

    With `drop_last`, for training, every batch is whole: what is left at the epoch's end is dropped, and a file that cannot
    be read is replaced by the next one of the order, behind this step, that can; the ranks take such in turn. After 32 tries
    in vain, one after another, comes Unreadable, a RuntimeError. Without, for evaluation, every file comes exactly once over
    all ranks, except those that cannot be read; all ranks have as many steps, so that the last batch, shared evenly, may be
    empty on some.

    `workers` processes read ahead (0: this one reads); they ignore the interrupt of Ctrl-C, which ends them through this
    process. If one dies, PyTorch's RuntimeError names it. Nothing here draws from PyTorch's own generators. Where CUDA is,
    batches are in pinned memory.

    Raises ValueError or TypeError for arguments out of range, and where there are too few files for one step.
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
    steps, rest = divmod(len(order), batch_size * world)
    if not drop_last and rest:
        steps += 1
    if not steps:
        came = f"{len(order)}; a step takes batch_size * world = {batch_size} * {world}"
        raise ValueError(f"batches: dataset must have files for one step, got {came} (drop_last=False takes fewer)")
    check_integer("batches", "skip", skip, 0, steps)
    read = _Steps(dataset, epoch, torch.tensor(order), batch_size * world, rank, world, replace=drop_last)
    return Batches(read, range(skip, steps), workers)


class Batches:
    """What `batches` returns: its length is the number of steps left; each iteration starts worker processes of its own."""

    def __init__(self, read: "_Steps", steps: range, workers: int) -> None:
        self._read, self._steps, self._workers = read, steps, workers

    def __len__(self) -> int:
        return len(self._steps)

    def __iter__(self) -> Iterator[Batch]:
        loader = DataLoader(
            self._read,
            batch_size=None,
            sampler=self._steps,
            num_workers=self._workers,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=_ignore_interrupts,
            generator=torch.Generator(),  # else it draws the workers' seeds from PyTorch's own
        )
        return iter(loader)


@dataclass(frozen=True)
class _Steps(Dataset):
    """A rank's batches of one epoch by number, as worker processes read them."""

    dataset: ClipFolder
    epoch: int
    order: Tensor  # a tensor, which workers share; a list would be copied as its items are counted
    whole: int  # files that a step takes over all ranks
    rank: int
    world: int
    replace: bool

    def __getitem__(self, step: int) -> Batch:
        own = self._own(step)
        samples: list[Sample] = []
        indices: list[int] = []
        bad: dict[int, str] = {}
        row = 0  # of bad files one after another
        for index in chain(own, self._next(step) if self.replace else ()):
            if len(samples) == len(own):
                break
            if self.replace and row == MOST_BAD:
                raise Unreadable(f"batches: none of {len(bad)} files can be read: {'; '.join(list(bad.values())[:SHOWN])}")
            row += 1
            if index in bad:  # the order has gone round
                continue
            try:
                samples.append(self.dataset.sample(index, self.epoch))
            except VideoError as error:
                bad[index] = str(error)
            else:
                indices.append(index)
                row = 0
        size, frames = self.dataset.size, self.dataset.frames
        clips = torch.stack([s.clip for s in samples]) if samples else torch.empty(0, 3, frames, size, size)
        labels = torch.tensor([s.label for s in samples], dtype=torch.int64)
        return Batch(clips, labels, torch.tensor(indices, dtype=torch.int64), tuple(bad.values()))

    def _own(self, step: int) -> list[int]:
        """This rank's files of a step; of the last, which may lack some, an even part."""
        shared = self.order[step * self.whole : (step + 1) * self.whole]
        size = len(shared)
        return shared[self.rank * size // self.world : (self.rank + 1) * size // self.world].tolist()

    def _next(self, step: int) -> Iterator[int]:
        """The files that follow a step's in the order, round and round: the ranks take them in turn."""
        for place in count((step + 1) * self.whole + self.rank, self.world):
            yield int(self.order[place % len(self.order)])


def _ignore_interrupts(_: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
