"""Clips of videos whose labels are numbers, the targets of a regression."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fused.train.data.clips import ClipFolder
from fused.train.data.list_columns import NUMBER
from fused.train.data.list_file import check_repeats, read_list
from fused.train.data.listing import Listing


class Target(NamedTuple):
    """A video of a list: its path, the number in its line, and the number of frames that the list states."""

    path: Path
    number: float
    stated_frames: int | None


def read_targets(
    data: str | Path, separator: str | None = None, prefix: str | Path | None = None, columns: Sequence[str] | None = None
) -> tuple[list[Target], list[str]]:
    """Return the videos of a list whose labels are numbers, sorted by path, and notes. `list_videos` explains the arguments.

    Raises ValueError for a folder, which holds no numbers, for a list without videos, and for a label that is no number.
    """
    file = Path(data)
    if not file.is_file():
        raise ValueError(f"data is {str(data)!r}; allowed for a model of one output: a list, with path,number in each line")
    listed, notes = read_list(file, separator, columns, prefix)
    notes += check_repeats(file, listed, True)
    targets = []
    for path, label, frames, line in sorted(listed):
        if not NUMBER.fullmatch(label) or not math.isfinite(float(label)):
            raise ValueError(f"{file}, line {line}: {path} has the target {label!r}; allowed: a number")
        targets.append(Target(path, float(label), frames))
    if not targets:
        raise ValueError(f"data is {str(data)!r}, a list without a video; allowed: path,number in each line")
    return targets, notes


class TargetClips(ClipFolder):
    """The clips of a list of `path,number`. The label of a clip is the index of its video, whose target is in `targets`.

    A target is (number - mean) / std. Other arguments and errors are those of `ClipFolder` and `read_targets`.
    """

    targets: tuple[float, ...]

    def __init__(self, *where: Any, mean: int | float, std: int | float, **options: Any) -> None:
        self._mean, self._std = mean, std
        super().__init__(*where, **options)

    def list_files(
        self, root: str | Path, classes: Sequence[str] | None, separator: str | None, prefix: str | Path | None,
        columns: Sequence[str] | None, images: bool = False,
    ) -> Listing:  # fmt: skip
        """Return the videos of the list, without classes."""
        found, notes = read_targets(root, separator, prefix, columns)
        self.targets = tuple((target.number - self._mean) / self._std for target in found)
        files, stated = tuple(target.path for target in found), tuple(target.stated_frames for target in found)
        return Listing(files, tuple(range(len(found))), (), stated, tuple(notes))
