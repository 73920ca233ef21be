"""The videos of an evaluation: what a list or folder says of them, and the views of each."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fused.io.picture import MEAN, STD, height_width
from fused.io.preprocessing import Preprocessing
from fused.io.views import Views
from fused.train.data.batches import Sample
from fused.train.data.listing import list_videos
from fused.train.data.target_clips import read_targets


@dataclass(frozen=True)
class Labelled:
    """A video of a list: its absolute path, the class number or target (in the model's unit), and the list's frame count."""

    path: Path
    label: int | float
    stated_frames: int | None


def list_classified(
    data: str | Path, names: Sequence[str], images: bool, separator: str | None, prefix: str | None,
    columns: Sequence[str] | None,
) -> tuple[list[Labelled], tuple[str, ...]]:  # fmt: skip
    """Return the videos of a folder or list, each once, whose classes are among `names`, and notes. See `list_videos`.

    With `images`, for an image model, every image of a folder is one, and no video is.

    The class of a video is its place in `names`, whatever other classes the list has. Raises ValueError for what does not fit.
    """
    listing = list_videos(data, names, separator, prefix, columns, images)
    rows = zip(listing.files, listing.labels, listing.stated_frames, strict=True)
    return _each_once([Labelled(Path(os.path.abspath(path)), label, stated) for path, label, stated in rows]), listing.notes


def list_targets(
    data: str | Path, mean: int | float, std: int | float, separator: str | None, prefix: str | None,
    columns: Sequence[str] | None,
) -> tuple[list[Labelled], tuple[str, ...]]:  # fmt: skip
    """Return the videos of a list whose labels are numbers, each once, with (label - mean) / std as target, and notes.

    Raises what `read_targets` raises.
    """
    found, notes = read_targets(data, separator, prefix, columns)
    videos = [Labelled(Path(os.path.abspath(path)), (number - mean) / std, frames) for path, number, frames in found]
    return _each_once(videos), tuple(notes)


def list_unlabelled(
    data: str | Path, images: bool, separator: str | None, prefix: str | None, columns: Sequence[str] | None,
    name: str = "data",
) -> list[Labelled]:  # fmt: skip
    """Return the videos, or `images`, of a folder or list, each once, with label -1.

    Raises ValueError for others, with `name`, that of the argument.
    """
    try:
        listing = list_videos(data, (), separator, prefix, columns, images)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    rows = zip(listing.files, listing.stated_frames, strict=True)
    return _each_once([Labelled(Path(os.path.abspath(path)), -1, stated) for path, stated in rows])


class VideoViews:
    """The views of videos, for `fused.train.data.batches.batches`: a sample is (V, 3, T, height, width), T left out for images.

    Views of upstream's resize are bytes where that loses nothing, otherwise normalised float32.
    """

    def __init__(
        self, videos: Sequence[Labelled], preprocessing: Preprocessing, views: Views, frame_pattern: str | None
    ) -> None:
        self.videos, self.preprocessing, self.views, self.frame_pattern = tuple(videos), preprocessing, views, frame_pattern
        self.files = tuple(video.path for video in videos)
        usual = (preprocessing.mean, preprocessing.std) == (MEAN, STD) and preprocessing.frames is not None
        self.dtype = torch.uint8 if views.resize != "antialiased" and usual else torch.float32

    def __len__(self) -> int:
        return len(self.files)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of a sample; with windows, of which a video may have several, that of a video with one."""
        frames = () if self.preprocessing.frames is None else (self.preprocessing.frames,)
        return (self.views.clips * self.views.crops, 3, *frames, *height_width(self.preprocessing.size))

    def sample(self, index: int, epoch: int) -> Sample:
        """Return the views of video `index`, and its index. Raises what `Views.read` raises."""
        video = self.videos[index]
        clips: Tensor = self.views.read(
            self.preprocessing, video.path, frame_pattern=self.frame_pattern, stated_frames=video.stated_frames,
            as_bytes=self.dtype == torch.uint8,
        )  # fmt: skip
        return Sample(clips, index)


def _each_once(videos: Sequence[Labelled]) -> list[Labelled]:
    """Return the videos without repetitions of a path, in order. Raise ValueError for one with two labels.

    A list is refused before that if it writes the path in the same way both times.
    """
    found: dict[Path, Labelled] = {}
    for video in videos:
        other = found.setdefault(video.path, video)
        if other.label != video.label:
            raise ValueError(f"{video.path} has two labels, and is written in two ways; allowed: one label of each video")
    return list(found.values())
