"""Find the video files of a training and their classes, in a folder, a folder of classes, or a list file."""

import csv
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

SUFFIXES = frozenset(
    ".3gp .asf .avi .flv .gif .h264 .m2ts .m4v .mjpeg .mkv .mov .mp4 .mpeg .mpg .mts .mxf .ogv .ts .vob .webm .wmv".split()
)
"""File names of videos in a folder; a list may name any file."""


class Listing(NamedTuple):
    """Sorted files, the class number of each (-1 without classes), and the class names."""

    files: tuple[Path, ...]
    labels: tuple[int, ...]
    classes: tuple[str, ...]


def list_videos(root: str | Path, classes: Sequence[str] | None) -> Listing:
    """Return the videos of a folder, or of a list of them. The files are not opened.

    `root` is one of
    - a folder of class folders, root/class/file.mp4, nested to any depth: the class is the first folder's name.
    - a folder of files, root/file.mp4: without classes.
    - a text file with `path,label`, or `path` alone, in each line, and optionally the header `path,label`. Paths are relative
      to the file's folder. Labels that are all integers are class numbers, otherwise they are class names.

    `classes` is None for the names that occur, sorted; or the names in the order of their numbers, and no others may occur
    (validation takes those of training, of which some may be missing); or () to ignore classes. Hidden files and folders are
    left out.

    Raises TypeError for `classes` of another type, and ValueError for anything else that does not fit; the message names the
    file or the line.
    """
    _check_classes(classes)
    root, classes = Path(root), None if classes is None else tuple(classes)
    if root.is_dir():
        found = _scan_folder(root, classes != ())
    elif not root.exists():
        raise ValueError(f"root must be a folder of videos, or a list of them (path,label in each line); there is no {root}")
    else:
        found = _read_list(root)
    if not found:
        kinds = f"files with the suffixes {' '.join(sorted(SUFFIXES))}" if root.is_dir() else "path,label in each line"
        raise ValueError(f"root must hold videos, {kinds}; there is none in {root}")
    found.sort()
    files = tuple(path for path, _ in found)
    names = [name for _, name in found]
    if classes == () or not any(names):
        if classes:
            raise ValueError(f"classes are {_abbreviate(classes)}, but the videos of {root} have none; allowed: None or ()")
        return Listing(files, (-1,) * len(files), ())
    if not all(names):
        unlabelled = files[names.index("")]
        raise ValueError(f"root must hold videos with classes or without, not both; {unlabelled} has none, and others have one")
    known = classes or _class_names(names)
    numbers = {name: number for number, name in enumerate(known)}
    for path, name in found:
        if name not in numbers:
            raise ValueError(f"{path} has the class {name!r}; allowed are {_abbreviate(known)}")
    return Listing(files, tuple(numbers[name] for name in names), known)


def _scan_folder(root: Path, with_classes: bool) -> list[tuple[Path, str]]:
    """Return (path, class name) of every video below a folder; the name is "" without classes."""
    found = []
    for folder, inner, names in os.walk(root, followlinks=True):  # classes are often links
        inner[:] = [name for name in inner if not name.startswith(".")]
        for name in names:
            path = Path(folder, name)
            if path.suffix.lower() in SUFFIXES and not name.startswith("."):
                parts = path.relative_to(root).parts
                found.append((path, parts[0] if with_classes and len(parts) > 1 else ""))
    return found


def _read_list(file: Path) -> list[tuple[Path, str]]:
    """Return (path, label) of every line of a list; the label is "" where there is none."""
    found = []
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            for number, row in enumerate(csv.reader(lines), 1):
                row = [cell.strip() for cell in row]
                if not any(row) or (number == 1 and [cell.lower() for cell in row] == ["path", "label"]):
                    continue
                if len(row) > 2 or not row[0]:
                    raise ValueError(f"{file}, line {number}: allowed is path,label, or path alone, got {','.join(row)!r}")
                found.append((file.parent / row[0], row[1] if len(row) == 2 else ""))
    except (UnicodeDecodeError, csv.Error) as error:
        wanted = "a folder of videos, or a list of them (UTF-8 text, path,label in each line)"
        raise ValueError(f"root must be {wanted}, got {file}") from error
    return found


def _class_names(names: list[str]) -> tuple[str, ...]:
    """Return the names that occur, sorted; if all are integers, every number from 0 to the highest."""
    if all(name.isascii() and name.isdigit() for name in names):
        return tuple(map(str, range(max(map(int, names)) + 1)))
    return tuple(sorted(set(names)))


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
