"""The videos that a list file names: text with a path, and a label or more, in each line."""

import codecs
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from fused.train.data.list_columns import NUMBER, Line, bad_line, read_table

WANTED = "a folder of videos, or a list of them (UTF-8 text, path,label in each line)"


class ListedVideo(NamedTuple):
    """One line of a list. `label` is "" and `frames` is None in a list without that column."""

    path: Path
    label: str
    frames: int | None
    line: int


def read_list(
    file: Path, separator: str | None, columns: Sequence[str] | None, prefix: str | Path | None
) -> tuple[list[ListedVideo], list[str]]:
    """Return the videos of a list in its order, and notes on lines that name none. No video is opened.

    `read_table` describes `separator` and `columns`. A path is joined to `prefix`, or without one to the list's folder, unless
    it is absolute. Empty lines and lines that begin with # are left out. The text is UTF-8, or UTF-16 with a byte order mark.
    A path in another encoding is allowed if the file with those bytes exists.

    Raises ValueError, which names the file and the line, for what cannot be read.
    """
    folder = file.parent if prefix is None else Path(prefix)
    if not folder.is_dir():
        raise ValueError(f"prefix is {str(prefix)!r}, and there is no such folder")
    lines, num_comments = _read_lines(file)
    if not lines:
        return [], []
    table = read_table(file, lines, separator, columns)
    notes = list(table.notes)
    if num_comments:
        notes.append(f"{_count(num_comments, 'line')} of {file}: left out, since a line that begins with # is a comment")
    videos = []
    for line, cells in table.rows:
        row = dict(zip(table.columns, cells, strict=True))
        for name in table.columns:
            if not row[name] and name != "skip":
                raise bad_line(file, line, f"has no {name}")
        label = row.get("label", "")
        path = folder / row["path"]
        _check_path(file, line, row["path"], path)
        if not _is_utf8(label):
            raise bad_line(file, line, "has a label in another encoding; allowed is UTF-8 text")
        frames = row.get("frames")
        if frames is not None and not re.fullmatch("[0-9]+", frames):
            raise bad_line(file, line, f"has {frames!r} for the number of frames; allowed: an integer from 0 up")
        seconds = row.get("seconds")
        if seconds is not None and (not NUMBER.fullmatch(seconds) or float(seconds) < 0):
            raise bad_line(file, line, f"has {seconds!r} for the seconds; allowed: a number from 0 up")
        videos.append(ListedVideo(path, label, None if frames is None else int(frames), line.number))
    return videos, notes


def check_repeats(file: Path, videos: Sequence[ListedVideo], with_labels: bool) -> list[str]:
    """Return a note if paths occur more than once. Raise ValueError if one does so with another label or number of frames."""
    first: dict[str, ListedVideo] = {}
    repeats = 0
    for video in videos:
        other = first.setdefault(os.path.normpath(video.path), video)
        repeats += other is not video
        for name, one, two in (("label", other.label, video.label), ("frame count", other.frames, video.frames)):
            if one != two and (with_labels or name != "label"):
                raise ValueError(
                    f"{file}, lines {other.line} and {video.line}: {video.path} has {name}s {one!r} and {two!r}; allowed: one"
                )
    return [f"{_count(repeats, 'line')} of {file}: the same video as an earlier line, taken again"] if repeats else []


def _read_lines(file: Path) -> tuple[list[Line], int]:
    """Return the lines of a text file, without empty ones, and the number of comments. Bytes that are no UTF-8 are escaped."""
    if file.suffix.lower() in (".json", ".jsonl"):
        raise ValueError(f"root must be {WANTED}, got {file}, which is named as JSON")
    with file.open("rb") as stream:
        head = stream.read(4096)
        is_utf16 = head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        if b"\0" in head and not is_utf16:
            raise ValueError(f"root must be {WANTED}, got {file}, which is no text")
        content = head + stream.read()
    try:
        text = content.decode("utf-16") if is_utf16 else content.decode("utf-8-sig", "surrogateescape")
    except UnicodeDecodeError as error:
        raise ValueError(f"root must be {WANTED}, got {file}: {error}") from error
    lines, num_comments, indented = list[Line](), 0, list[int]()
    for number, line in enumerate(re.split("\r\n|\r|\n", text), 1):
        line = line.lstrip("\ufeff")  # lists that were joined have byte order marks inside
        if line.lstrip().startswith("#"):
            num_comments += 1
        elif line.strip().strip(",; "):
            if line.startswith("\t"):
                indented.append(len(lines))
            lines.append(Line(number, line.strip()))
    if indented == [0] and len(lines) > 1:  # the first word of a header is empty, as pandas writes it over an index
        lines[0] = Line(lines[0].number, "\t" + lines[0].text)
    return lines, num_comments


def _check_path(file: Path, line: Line, written: str, path: Path) -> None:
    """Raise ValueError for a URL, and for a Windows path or a path in another encoding that names no file here."""
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", written):
        raise bad_line(file, line, "names a URL; allowed: the path of a file or of a folder of frames")
    if os.name != "nt" and (re.match(r"[A-Za-z]:[\\/]", written) or "\\" in written) and not os.path.lexists(path):
        raise bad_line(file, line, f"names a Windows path, and there is no {path}; allowed: folders joined by /, as here")
    if not _is_utf8(written) and not os.path.lexists(path):
        raise bad_line(file, line, "has a path in another encoding, and there is no such file; allowed is UTF-8 text")


def _is_utf8(text: str) -> bool:
    """Return whether a text was decoded without escaped bytes."""
    return text.isascii() or not any("\udc80" <= character <= "\udcff" for character in text)


def _count(number: int, noun: str) -> str:
    """Return a number with its noun."""
    return f"{number} {noun}{'' if number == 1 else 's'}"
