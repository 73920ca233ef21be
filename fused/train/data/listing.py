"""Find the videos of a training and their classes, in a folder, a folder of classes, or a list file."""

import os
import re
import unicodedata
from collections.abc import Sequence, Set
from pathlib import Path
from typing import NamedTuple

from fused.io.frame_folder import IMAGE_SUFFIXES
from fused.io.video_stream import is_undecodable
from fused.train.data.folder_scan import SUFFIXES, scan_folder, scan_images
from fused.train.data.list_columns import NUMBER, check_options
from fused.train.data.list_file import ListedVideo, check_repeats, read_list

CLASS_NUMBER = re.compile("0|[1-9][0-9]{0,4}")  # a higher number is a date, or the number of something else


class Listing(NamedTuple):
    """Sorted videos, the class number of each, the class names, and notes.

    A video is a file, or a folder of frames.
    """

    files: tuple[Path, ...]
    labels: tuple[int, ...]  # -1 without classes
    classes: tuple[str, ...]
    stated_frames: tuple[int | None, ...]  # the number of frames that a list states; None without one
    notes: tuple[str, ...]  # sentences on what was left out or is unusual


def list_videos(
    root: str | Path, classes: Sequence[str] | None, separator: str | None = None, prefix: str | Path | None = None,
    columns: Sequence[str] | None = None, images: bool = False,
) -> Listing:  # fmt: skip
    """Return the videos of a folder, or of a list of them, or with `images` the image files. The files are not opened.

    `root` is one of
    - a folder of class folders, root/class/file.mp4 or root/class/video/img_00001.jpg, nested to any depth: the class is the
      first folder's name. A folder that holds images, and neither videos nor other folders of images, is one video.
    - a folder of videos, root/file.mp4 or root/video/img_00001.jpg: without classes.
    - a text file with `path,label`, or `path` alone, in each line, and optionally a third column with the number of frames
      (path,frames,label) or with seconds (path,label,seconds). `list_columns.read_table` says how separator, header and columns
      are found, and how the options `separator` and `columns` set them. Paths are relative to the folder `prefix`, or without
      one to the list's folder. Seconds are checked and not used.

    Labels of a list that are all integers are class numbers, otherwise they are class names. Names of class folders are class
    numbers too if all are integers without leading zeros. Numbers are below 100,000. Those up to the highest that have no video
    are classes too, and a note says which.

    `classes` is None for the names that occur, sorted; or the names in the order of their numbers, and no others may occur
    (validation takes those of training, of which some may be missing); or () to ignore classes. Hidden files and folders are
    left out.

    Raises TypeError for `classes` of another type, OSError for a folder that cannot be read, and ValueError for anything else
    that does not fit: lines that do not parse, labels such as -1 or 0.0, numbers among names, a path with two labels. The
    message names the file or the line.
    """
    _check_classes(classes)
    check_options(separator, columns)
    root, classes = Path(root), None if classes is None else tuple(classes)
    if root.is_dir():
        for name, value in (("separator", separator), ("prefix", prefix), ("columns", columns)):
            if value is not None:
                raise ValueError(f"{name} is {value!r}, but {root} is a folder; allowed for a list of videos only")
        videos, notes = _scan(root, classes != (), images)
        suffixes = " ".join(sorted(IMAGE_SUFFIXES if images else SUFFIXES))
        wanted = f"files with the suffixes {suffixes}{'' if images else ', or folders of images'}"
    elif root.exists():
        videos, notes = _read(root, classes, separator, columns, prefix)
        wanted = "path,label in each line"
    else:
        raise ValueError(f"root must be a folder of videos, or a list of them (path,label in each line); there is no {root}")
    if not videos:
        raise ValueError(f"root must hold {'images' if images else 'videos'}, {wanted}; there is none in {root}")
    videos.sort(key=lambda video: video.path)
    paths, names = tuple(video.path for video in videos), [video.label for video in videos]
    frames = tuple(video.frames for video in videos)
    if classes == () or not any(names):
        if classes:
            raise ValueError(f"classes are {_abbreviate(classes)}, but the videos of {root} have none; allowed: None or ()")
        return Listing(paths, (-1,) * len(paths), (), frames, tuple(notes))
    if not all(names):
        unlabelled = paths[names.index("")]
        raise ValueError(f"root must hold videos with classes or without, not both; {unlabelled} has none, and others have one")
    if strange := next(filter(is_undecodable, names), None):
        raise ValueError(f"{root} has the class {strange!r}, a name in another encoding; allowed is UTF-8: rename the folder")
    known = classes or _class_names(names)
    numbers = {name: number for number, name in enumerate(known)}
    for video in videos:
        if video.label not in numbers:
            raise ValueError(f"{video.place} has the class {video.label!r}; allowed are {_abbreviate(known)}")
    notes += _class_notes(root, known, set(names))
    return Listing(paths, tuple(numbers[name] for name in names), known, frames, tuple(notes))


class _Video(NamedTuple):
    path: Path
    label: str  # "" without a class
    frames: int | None
    place: str  # what an error says of it


def _scan(root: Path, with_classes: bool, images: bool) -> tuple[list[_Video], list[str]]:
    """Return the videos, or `images`, of a folder, and notes."""
    paths, notes = (scan_images(root), []) if images else scan_folder(root)
    videos = []
    for path in paths:
        parts = path.relative_to(root).parts
        videos.append(_Video(path, parts[0] if with_classes and len(parts) > 1 else "", None, str(path)))
    used = {video.label for video in videos}
    folders = sorted(path.name for path in root.iterdir() if os.path.isdir(path) and not path.name.startswith("."))
    empty = [name for name in folders if name not in used]
    if any(used) and empty:
        notes.append(f"{root}: class folders without a video: {_abbreviate(empty)}")
    return videos, notes


def _read(
    file: Path, classes: tuple[str, ...] | None, separator: str | None, columns: Sequence[str] | None,
    prefix: str | Path | None,
) -> tuple[list[_Video], list[str]]:
    """Return the videos of a list, and notes."""
    listed, notes = read_list(file, separator, columns, prefix)
    notes += check_repeats(file, listed, classes != ())
    if classes is None:
        _check_labels(file, listed)
    videos, known = [], set(classes or ())
    for path, label, frames, line in listed:
        if re.fullmatch("[0-9]{1,99}", label) and label not in known:
            label = str(int(label))  # 007 is class 7
        videos.append(_Video(path, label, frames, f"{file}, line {line}: {path}"))
    return videos, notes


def _check_labels(file: Path, videos: Sequence[ListedVideo]) -> None:
    """Raise ValueError for numbers among class names, and for a number that is no class number."""
    numbers = [video for video in videos if NUMBER.fullmatch(video.label)]
    if numbers and len(numbers) < len(videos):
        name = next(video for video in videos if not NUMBER.fullmatch(video.label))
        two = sorted((numbers[0], name), key=lambda video: video.line)
        lines = " and ".join(f"line {video.line} has the label {video.label!r}" for video in two)
        raise ValueError(f"{file}: {lines}; allowed: class numbers or class names, not both")
    for video in numbers:
        if not CLASS_NUMBER.fullmatch(video.label.lstrip("0") or "0"):
            allowed = "a class number from 0 to 99999, a name, or no label in any line"
            raise ValueError(f"{file}, line {video.line}: {video.path} has the label {video.label!r}; allowed: {allowed}")


def _class_names(names: Sequence[str]) -> tuple[str, ...]:
    """Return the names that occur, sorted; if all are class numbers, every number from 0 to the highest."""
    used = sorted(set(names))
    return tuple(map(str, range(max(map(int, used)) + 1))) if all(map(CLASS_NUMBER.fullmatch, used)) else tuple(used)


def _class_notes(root: Path, classes: Sequence[str], used: Set[str]) -> list[str]:
    """Return sentences on classes without a video, and on names that hardly differ."""
    notes = []
    missing = [name for name in classes if name not in used]
    if missing:
        notes.append(f"{root}: {len(missing)} of {len(classes)} classes without a video: {_abbreviate(missing)}")
    alike: dict[str, list[str]] = {}
    for name in classes:
        alike.setdefault(unicodedata.normalize("NFC", name).casefold(), []).append(name)
    for group in alike.values():
        if len(group) > 1:
            notes.append(f"{root}: classes that differ by case or by the encoding of accents only: {_abbreviate(group)}")
    return notes


def _check_classes(classes: Sequence[str] | None) -> None:
    """Raise TypeError unless `classes` is None or a sequence of names, ValueError unless the names differ."""
    if classes is None:
        return
    if isinstance(classes, str) or not all(isinstance(name, str) and name for name in classes):
        raise TypeError(f"classes must be a sequence of names, or None, got {classes!r}")
    if len(set(classes)) < len(classes):
        raise ValueError(f"classes must be names that differ, got {_abbreviate(classes)}")


def _abbreviate(names: Sequence[str]) -> str:
    """Return the first ten names, and how many others there are."""
    few = ", ".join(map(repr, names[:10]))
    return few if len(names) <= 10 else f"{few} and {len(names) - 10} others"
