"""The data of a video-text training: clips, each with a caption, and images with captions in batches of their own."""

import random
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from fused.models.retrieval.words import clean_text
from fused.train.config import TrainConfig
from fused.train.data.batches import Batch, Batches, batches
from fused.train.data.captions import Captioned, read_captions
from fused.train.data.clips import ClipFolder
from fused.train.data.first_look import try_videos
from fused.train.data.listing import Listing


class CaptionedClips(ClipFolder):
    """Clips of videos, or images, one for each pair of a video and a caption; the label of a pair is its number."""

    def __init__(self, pairs: Sequence[Path], first: int, frames: int | None, config: TrainConfig) -> None:
        self._pairs, self._first = tuple(pairs), first
        data = config.data
        super().__init__(
            data.train or "", frames, data.size, train=True, sampling=data.sampling, stride=data.stride, fps=data.fps,
            short=data.short, scale=data.scale, flip=data.flip, erased=data.erased, augment=data.augment, seed=config.seed,
            frame_pattern=data.frame_pattern, dtype=torch.uint8,
        )  # fmt: skip
        if frames is not None:
            self.preprocessing = data.preprocessing

    def list_files(self, *_: Any, **__: Any) -> Listing:
        """Return the videos of the pairs, in their order."""
        count = len(self._pairs)
        return Listing(self._pairs, tuple(range(self._first, self._first + count)), (), (None,) * count, ())


class CaptionData:
    """Videos with captions and, with data.images, images with captions.

    `captions` holds the caption of every pair, of videos first; `ids` are equal for pairs that are right answers of each other.
    `files` and `notes` are those of a `ClipFolder`. Raises ValueError for files that cannot be read, naming the key.
    """

    classes: tuple[str, ...] = ()

    def __init__(self, config: TrainConfig) -> None:
        data = config.data
        self.sources: list[CaptionedClips] = []
        self.captions: tuple[str, ...] = ()
        self.ids: tuple[int, ...] = ()
        notes: list[str] = []
        given = [("data.train", data.train, data.prefix, data.frames), ("data.images", data.images, data.images_prefix, None)]
        for key, file, prefix, frames in given:
            if file is None:
                continue
            try:
                found = read_captions(file, prefix, data.paragraph)
                if any(entry.answer is not None for entry in found.entries):
                    raise ValueError(f"{file} holds a multiple choice, with answers; allowed: captions that are all right")
                pairs = [(p, c, e) for e in found.entries for p in e.paths for c in e.captions]
                source = CaptionedClips([path for path, _, _ in pairs], len(self.captions), frames, config)
                notes += [*found.notes, *try_videos(source)]
            except (ValueError, OSError) as error:
                raise ValueError(f"{key}: {error}") from error
            self.sources.append(source)
            self.ids += tuple(_numbers(pairs, config.text.ids, max(self.ids, default=-1) + 1))
            self.captions += tuple(caption for _, caption, _ in pairs)
            notes += _shared_captions(pairs, file, config.text.ids)
        self.notes = tuple(notes)
        self.files = tuple(chain.from_iterable(source.files for source in self.sources))

    def __len__(self) -> int:
        return len(self.files)

    def batches(self, config: TrainConfig, epoch: int, skip: int, rank: int, world: int) -> "AlternatingBatches":
        """Return the micro-batches of an epoch of process `rank` of `world`, without the first `skip`."""
        return AlternatingBatches(self.sources, config, epoch, skip, rank, world)


class AlternatingBatches:
    """Batches of several sources in one shuffled order, which (seed, epoch) determine and all processes share."""

    def __init__(
        self, sources: Sequence[CaptionedClips], config: TrainConfig, epoch: int, skip: int, rank: int, world: int
    ) -> None:
        def of(source: CaptionedClips, skip: int) -> Batches:
            return batches(
                source, config.batch_size // (world * config.accumulate), epoch=epoch, seed=config.seed,
                workers=config.data.workers, rank=rank, world=world, skip=skip,
            )  # fmt: skip

        order = [number for number, source in enumerate(sources) for _ in range(len(of(source, 0)))]
        if len(sources) > 1:
            random.Random(f"{config.seed} {epoch} sources").shuffle(order)
        before, self._order = order[:skip], order[skip:]
        self._batches = [of(source, before.count(number)) for number, source in enumerate(sources)]

    def __len__(self) -> int:
        return len(self._order)

    def __iter__(self) -> Iterator[Batch]:
        each = [iter(source) for source in self._batches]
        for number in self._order:
            yield next(each[number])


def _numbers(pairs: Sequence[tuple[Path, str, Captioned]], kind: str, first: int) -> Iterator[int]:
    """Yield the id of each pair: a number from `first` up for its video's identity, or for its caption."""
    seen: dict[str, int] = {}
    for path, caption, entry in pairs:
        identity = entry.identity if len(entry.paths) == 1 else str(path)
        yield first + seen.setdefault(clean_text(caption) if kind == "caption" else identity, len(seen))


def _shared_captions(pairs: Sequence[tuple[Path, str, Captioned]], file: str, kind: str) -> list[str]:
    """Return a note if captions are of several videos, which text.ids "video" takes for wrong answers of each other."""
    videos: dict[str, set[Path]] = {}
    for path, caption, _ in pairs:
        videos.setdefault(clean_text(caption), set()).add(path)
    shared = [caption for caption, of in videos.items() if len(of) > 1]
    if kind == "caption" or not shared:
        return []
    advice = "with text.ids=caption these are right answers of each other"
    return [f"{file}: {len(shared)} captions are of several videos, such as {shared[0]!r}; {advice}"]
