"""Samples of a list of conversations: tokens, labels, and the frames of a video or an image.

    data = ConversationData(Path("list.json"), None, VambaReader(tokenizer, frames=8, longest=640, length=32768))
    for batch in batches(data, 8, epoch=0, seed=0, workers=4):
        for row in batch.rows:      # samples that pass the model together
            ...
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from fused.io.repeated_frames import RepeatedFrames, even_places, middle_places
from fused.io.video import VideoError
from fused.models.bimba.model import VIDEO_TOKEN, VIDEO_WORD, time_instruction, video_token_count
from fused.models.bimba.towers import prepare_frames
from fused.models.conversation.turns import Turn, pieces_of, tokenize
from fused.models.vamba.loss import IGNORED
from fused.models.vamba.vision import SIDE, VIDEO_START, VIDEO_WORDS, frame_size, prepare_frame
from fused.train.data.batches import BadFile, SampleTooLong
from fused.train.language.entries import VIDEO_TAG, Entry, read_entries


class Sample(NamedTuple):
    """One conversation."""

    tokens: Int[Tensor, " L"]  # int64
    labels: Int[Tensor, " L"]  # the tokens of answers, else -100
    frames: Tensor  # as the model's tower takes them, (T, 3, h, w); none: (0, 3, 0, 0)
    video_tokens: int  # that the model makes of them
    place: int  # the number of text tokens before the video

    @property
    def length(self) -> int:
        """The tokens of text and video."""
        return len(self.tokens) + self.video_tokens


NO_FRAMES = torch.empty(0, 3, 0, 0)


@dataclass(frozen=True)
class VambaReader:
    """Samples of a Vamba: frames from the middles of equal parts; an image is shown twice."""

    tokenizer: Any
    frames: int
    longest: int | None
    length: int
    packs = True  # several samples into a row
    takes_images = True

    def read(self, entry: Entry) -> Sample:
        """Return a sample with frames (T, 3, h, w), bytes, T even. Raises VideoError, SampleTooLong."""
        turns = [turn._replace(text=turn.text.replace(VIDEO_TAG, VIDEO_WORDS)) if _asks(entry, turn) else turn
                 for turn in entry.turns]  # fmt: skip
        tokens, labels = tokenize(self.tokenizer, pieces_of(self.tokenizer, turns))
        _check_length(entry, len(tokens), 0, self.length)
        place = 0
        frames: list[Tensor] = []
        if entry.file is not None:
            start = self.tokenizer.convert_tokens_to_ids(VIDEO_START)
            place = tokens.index(start) + 1 if start in tokens else 0
            pairs = 1 if entry.is_image else self.frames // 2
            size: tuple[int, int] | None = None
            for image, times in RepeatedFrames(entry.file, 1 if entry.is_image else 2 * pairs, middle_places):
                if size is None:
                    size = frame_size(image.shape[0], image.shape[1], self.longest)
                    _check_length(entry, len(tokens), self._tokens(pairs, size), self.length)
                frames += [prepare_frame(image, size)] * (2 if entry.is_image else times)
        stacked = torch.stack(frames) if frames else NO_FRAMES
        count = self._tokens(len(frames) // 2, (stacked.shape[2], stacked.shape[3]))
        return Sample(torch.tensor(tokens), torch.tensor(labels), stacked, count, place)

    @staticmethod
    def _tokens(pairs: int, size: tuple[int, int]) -> int:
        return pairs * (size[0] // SIDE) * (size[1] // SIDE)


@dataclass(frozen=True)
class BimbaReader:
    """Samples of a BIMBA: frames evenly from the first to the last, with `times` an instruction that tells their times."""

    tokenizer: Any
    frames: int
    length: int
    times: bool
    config: Mapping[str, Any]  # the base model's config.json
    side: int  # pixels of the vision tower's square
    patch: int
    packs = False  # the language model, of the library transformers, reads one sample at a time
    takes_images = False  # they do not pass the compressor

    def read(self, entry: Entry) -> Sample:
        """Return a sample with frames (F, 3, S, S), float32. Raises VideoError, SampleTooLong."""
        frames, turns, count = NO_FRAMES, entry.turns, 0
        if entry.file is not None:
            count = video_token_count(self.config, self.frames, self.side // self.patch)
            _check_length(entry, 0, count, self.length)
            found = RepeatedFrames(entry.file, self.frames, even_places)
            prepared = [(prepare_frames(image[None], self.side), times) for image, times in found]
            frames = torch.cat([image for image, times in prepared for _ in range(times)])
            turns = tuple(self._told(turn, found) if _asks(entry, turn) else turn for turn in entry.turns)
        video = (VIDEO_WORD, VIDEO_TOKEN) if entry.file is not None else None
        tokens, labels = tokenize(self.tokenizer, pieces_of(self.tokenizer, turns), video)
        _check_length(entry, len(tokens), count, self.length)
        place = tokens.index(VIDEO_TOKEN) if video else 0
        return Sample(torch.tensor(tokens), torch.tensor(labels), frames, count, place)

    def _told(self, turn: Turn, found: RepeatedFrames) -> Turn:
        """Return the first question with the video, a newline and the instruction about time, as `Bimba.tokenize` has them."""
        told = time_instruction(found.seconds, found.duration) if self.times and found.seconds is not None else ""
        before, after = turn.text.split(VIDEO_TAG)
        return Turn(turn.role, f"{before}{VIDEO_WORD}\n{told}{after}")


SampleReader = VambaReader | BimbaReader
"""The maker of samples from entries, for one kind of model. Worker processes hold copies of it."""


def _asks(entry: Entry, turn: Turn) -> bool:
    """Return whether a turn is the question with the place of the entry's file."""
    return entry.file is not None and turn.role == "user" and VIDEO_TAG in turn.text


def _check_length(entry: Entry, words: int, video: int, length: int) -> None:
    """Raise SampleTooLong for more tokens of text and video than a row may have."""
    if words + video > length:
        wrong = f"{words + video} tokens ({words} of text, {video} of video) are more than language.length {length}"
        allowed = "a larger language.length, fewer or smaller frames, a shorter text"
        raise SampleTooLong(entry.file or Path(entry.name), wrong, allowed)


@dataclass(frozen=True)
class PackedBatch:
    """The samples of a step in one process, in rows of a limited number of tokens."""

    rows: tuple[tuple[Sample, ...], ...]
    indices: Tensor  # int64, of the entries
    bad_files: tuple[BadFile, ...]

    @property
    def learnt(self) -> int:
        """The number of labelled tokens."""
        return sum(count_learnt(row) for row in self.rows)


def count_learnt(row: Sequence[Sample]) -> int:
    """Return the number of labelled tokens of a row."""
    return sum(int((sample.labels != IGNORED).sum()) for sample in row)


@dataclass
class ConversationData:
    """The samples of a list, a source for `batches`. `prefix` is the folder of its files (None: that of the list).

    Raises what `read_entries` raises, and ValueError for images that the model does not take.
    """

    path: Path
    prefix: Path | None
    reader: SampleReader
    entries: list[Entry] = field(init=False)
    files: tuple[Path, ...] = field(init=False)  # the entries' names, which are those of the list with a number
    notes: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    dtype = torch.uint8
    shape = (0,)

    def __post_init__(self) -> None:
        self.entries = read_entries(self.path, self.prefix)
        self.files = tuple(Path(entry.name) for entry in self.entries)
        images = [entry.name for entry in self.entries if entry.is_image]
        if images and not self.reader.takes_images:
            raise ValueError(
                f"{len(images)} of {len(self)} entries, the first is {images[0]}, have an image, which does not pass the "
                "compressor; allowed: videos, and texts without a file"
            )

    def __len__(self) -> int:
        return len(self.entries)

    def sample(self, index: int, epoch: int) -> Sample:
        """Return the sample of an entry, the same in every epoch. Raises VideoError for one that gives none."""
        return self.reader.read(self.entries[index])

    def collate(self, samples: Sequence[Sample], indices: Sequence[int], bad: Sequence[BadFile]) -> PackedBatch:
        """Return the batch of these samples."""
        rows = pack(samples, self.reader.length) if self.reader.packs else [[sample] for sample in samples]
        return PackedBatch(tuple(map(tuple, rows)), torch.tensor(indices, dtype=torch.int64), tuple(bad))

    def first_look(self, tried: int = 16) -> list[str]:
        """Read samples spread over the list until one can be read, and return notes on those that cannot.

        Raises ValueError if none can.
        """
        step = -(-len(self) // tried)
        wrong: list[str] = []
        for index in range(0, len(self), step):
            try:
                self.sample(index, 0)
            except VideoError as error:
                wrong.append(f"{self.files[index]}: {error}")
            else:
                return [f"{len(wrong)} entries that were tried give no sample: {wrong[0]}"] if wrong else []
        raise ValueError(f"none of {len(wrong)} entries that were tried gives a sample: {'; '.join(wrong[:3])}")


def pack(samples: Sequence[Sample], length: int) -> list[list[Sample]]:
    """Return the samples in rows of at most `length` tokens, each in the first row that has room for it."""
    rows: list[list[Sample]] = []
    for sample in samples:
        fits = (row for row in rows if sum(other.length for other in row) + sample.length <= length)
        row = next(fits, None)
        if row is None:
            rows.append([sample])
        else:
            row.append(sample)
    return rows
