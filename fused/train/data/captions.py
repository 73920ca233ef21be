"""Files of captions: CSV with `path,caption` in each line, or JSON as upstream's annotation files (video_mm).

A JSON file is a list of objects, a `.jsonl` file has one in each line, with the keys

    "video" or "image"  a path, or a list of paths that one caption fits
    "caption"           a sentence, or a list of them, each a caption by itself; with `paragraph` one text of all sentences
    "id"                what says that two objects are of the same video; by default the path
    "answer"            of a multiple choice: the number of the right caption, from 0

A CSV file has the columns path and caption; with a header that says so they are in any order, and id may be a third.
"""

import csv
import io
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fused.train.data.folder_scan import scan_folder
from fused.train.data.list_columns import HEADER_WORDS

CAPTION_WORDS = {"caption", "captions", "text", "sentence", "title"}  # of a header
KEYS = ("video", "image", "caption", "id", "answer")
MAX_LOOKED_FOR = 10_000  # paths, spread over a file, of which it is seen whether they are there
SHOWN = 3


class Captioned(NamedTuple):
    """An entry of a file of captions: one video, or several that its caption fits, and one caption or more."""

    paths: tuple[Path, ...]
    captions: tuple[str, ...]
    identity: str  # the same for entries of the same video
    answer: int | None  # the number of the right caption of a multiple choice


class CaptionFile(NamedTuple):
    """The entries of a file, in its order, and sentences on what is unusual."""

    entries: tuple[Captioned, ...]
    notes: tuple[str, ...]


def read_captions(file: str | Path, prefix: str | Path | None = None, paragraph: bool = False) -> CaptionFile:
    """Return the entries of a file of captions. No video is opened.

    Paths are relative to the folder `prefix`, or without one to the file's. With `paragraph` the captions of an entry are
    joined by blanks. Videos that are not there are noted, as are videos of the folder without a caption.

    Raises ValueError, which names the file and the line or entry, for what cannot be read, and where no video is there.
    """
    file = Path(file)
    if not file.is_file():
        wanted = "a CSV file with path,caption in each line, or a JSON file"
        raise ValueError(f"captions are in {str(file)!r}, which is no file; allowed: {wanted}")
    root = file.parent if prefix is None else Path(prefix)
    if not root.is_dir():
        raise ValueError(f"prefix is {str(prefix)!r}, and there is no such folder")
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is no UTF-8 text: {error}") from error
    unread: dict[str, int] = {}
    is_json = file.suffix.lower() in (".json", ".jsonl")
    rows = _read_json(file, text, unread) if is_json else _read_csv(file, text)
    entries = []
    for place, paths, captions, identity, answer in rows:
        if not paths or not all(paths):
            raise ValueError(f"{file}, {place} has no path; allowed: the path of a video or an image")
        if not captions or not all(caption.strip() for caption in captions):
            raise ValueError(f"{file}, {place} has an empty caption; allowed: words")
        if answer is not None and not 0 <= answer < len(captions):
            raise ValueError(f"{file}, {place} has the answer {answer}; allowed: 0 to {len(captions) - 1}, a caption's number")
        if paragraph and answer is None:
            captions = (" ".join(captions),)
        where = tuple(Path(os.path.abspath(root / path)) for path in paths)
        entries.append(Captioned(where, captions, identity or str(where[0]), answer))
    if not entries:
        raise ValueError(f"{file} holds no caption; allowed: path,caption in each line, or a list of objects")
    keys = ", ".join(f"{key!r} ({count} times)" for key, count in unread.items())
    notes = [f"{file}: keys that are not read: {keys}; those that are: {', '.join(KEYS)}"] if unread else []
    return CaptionFile(tuple(entries), (*notes, *_presence_notes(file, root, entries)))


_Row = tuple[str, tuple[str, ...], tuple[str, ...], str, int | None]  # place, paths, captions, identity, answer


def _read_csv(file: Path, text: str) -> Iterator[_Row]:
    separator = "\t" if file.suffix.lower() == ".tsv" else ","
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    columns: list[str] | None = None
    try:
        for cells in reader:
            place = f"line {reader.line_num}"
            if not any(cell.strip() for cell in cells):
                continue
            if columns is None:
                columns = _header(cells)
                if columns is not None:
                    continue
                columns = ["path", "caption"]
            if len(cells) != len(columns):
                advice = "a caption that holds a comma stands in double quotes, and an id needs the header path,caption,id"
                allowed = f"{len(columns)}, {','.join(columns)}; {advice}"
                raise ValueError(f"{file}, {place} has {len(cells)} cells; allowed: {allowed}")
            row = dict(zip(columns, (cell.strip() for cell in cells), strict=True))
            yield place, (row["path"],), (row["caption"],), row.get("id", ""), None
    except csv.Error as error:
        raise ValueError(f"{file}, line {reader.line_num} is no CSV: {error}") from error


def _header(cells: Sequence[str]) -> list[str] | None:
    """Return the columns that a header names, None for a line that is not a header."""
    names = []
    for cell in cells:
        word = cell.strip().lower().replace("_", "")
        names.append("caption" if word in CAPTION_WORDS else "id" if word == "id" else HEADER_WORDS.get(word, word))
    return names if {"path", "caption"} <= set(names) else None


def _read_json(file: Path, text: str, unread: dict[str, int]) -> Iterator[_Row]:
    try:
        in_lines = file.suffix.lower() == ".jsonl"
        content = [json.loads(line) for line in text.split("\n") if line.strip()] if in_lines else json.loads(text)
    except (ValueError, RecursionError) as error:  # RecursionError: nested too deeply
        raise ValueError(f"{file} is no JSON{' in every line' if in_lines else ''}: {error}") from error
    if not isinstance(content, list):
        raise ValueError(f"{file} holds a {type(content).__name__}; allowed: a list of objects with 'video' and 'caption'")
    for number, item in enumerate(content):
        place = f"entry {number}"
        if not isinstance(item, dict):
            raise ValueError(f"{file}, {place} is a {type(item).__name__}; allowed: an object with 'video' and 'caption'")
        for key in item.keys() - set(KEYS):
            unread[key] = unread.get(key, 0) + 1
        names = [key for key in ("video", "image") if key in item]
        if len(names) != 1 or "caption" not in item:
            allowed = "'caption', and one of 'video' and 'image'"
            raise ValueError(f"{file}, {place} has the keys {', '.join(map(repr, item))}; allowed: {allowed}")
        answer = item.get("answer")
        if answer is not None and (not isinstance(answer, int) or isinstance(answer, bool)):
            raise ValueError(f"{file}, {place} has the answer {answer!r}; allowed: a caption's number")
        identity = item.get("id")
        strings = (_strings(file, place, key, item[key]) for key in (names[0], "caption"))
        paths, captions = strings
        yield place, paths, captions, "" if identity is None else str(identity), answer


def _strings(file: Path, place: str, key: str, value: Any) -> tuple[str, ...]:
    """Return a sentence, or a list of them, as a tuple. Raise ValueError for anything else."""
    found = tuple(value) if isinstance(value, list) else (value,)
    if not all(isinstance(one, str) for one in found):
        raise ValueError(f"{file}, {place} has {value!r} for {key!r}; allowed: text, or a list of texts")
    return found


def _presence_notes(file: Path, root: Path, entries: Sequence[Captioned]) -> Iterator[str]:
    """Yield sentences on captions without a video and videos without a caption. Raise ValueError if there is no video."""
    paths = sorted({path for entry in entries for path in entry.paths})
    looked = paths[:: -(-len(paths) // MAX_LOOKED_FOR)]
    missing = [path for path in looked if not os.path.lexists(path)]
    if len(missing) == len(looked):
        raise ValueError(f"{file} names {len(paths)} videos; none is there, such as {paths[0]}; prefix sets their folder")
    if missing:
        yield f"{file}: {len(missing)} of {len(looked)} videos that were looked for are not there, such as {_some(missing)}"
    known = set(paths)
    without = [path for path in scan_folder(root)[0] if Path(os.path.abspath(path)) not in known]
    if without:
        yield f"{root}: {len(without)} videos have no caption in {file.name}, and are not read, such as {_some(without)}"


def _some(paths: Sequence[Path]) -> str:
    return ", ".join(str(path) for path in paths[:SHOWN])
