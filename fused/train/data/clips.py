"""Clips of a folder of videos, or of a list of them: how each is cut from its video, for a training or a test."""

import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fused.io.picture import Size, height_width
from fused.io.preprocessing import Preprocessing
from fused.io.video import Times, decode_clip
from fused.rules import check_integer, check_number
from fused.train.data.augment import Changes, erase
from fused.train.data.auto_augment import AugmentPolicy, pillow
from fused.train.data.batches import Sample
from fused.train.data.folder_scan import is_video_name
from fused.train.data.listing import Listing, list_videos


class ClipFolder:
    """The clips of a folder of video files, or of a list of them, a source for `batches`.

    `listing.list_videos` describes `root`, `classes`, `separator`, `prefix` and `columns`. A clip has `frames` frames; None is
    for an image model: every image below the folder, or on the list, is one. `size` is the side of a square, or (height,
    width), in pixels. `Preprocessing` explains `fps` and `short`. `frame_pattern`, such as "img_*.jpg", selects the images of
    folders of frames. Without `train`, a clip is what `Preprocessing.read` returns.

    With `train`, "segments" takes a random frame of each of `frames` equal segments of the video, and "dense" takes frames
    `stride` apart from a random start. All frames of a clip share one random crop (`scale`: lowest and highest fraction of the
    area; aspect 3:4 to 4:3 of the size's), mirrored with probability `flip`; with probability `erased` one box of all frames is
    noise (`erase`). `augment` names an `AugmentPolicy`, such as "rand-m7-n4-mstd0.5-inc1". With `repeats` above 1 a sample is
    that many clips of the same frames, (repeats, 3, T, height, width), for which everything else is drawn again (repeated
    sampling). `dtype` may be torch.uint8: pixels from 0 to 255, rounded after they are resized, and not normalised, which take
    a quarter of the memory. Random choices follow from (`seed`, epoch, number of the file).

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
