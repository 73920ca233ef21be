"""The rows and columns of a list of videos: which separator it has, whether it has a header, and what each column holds."""

import csv
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from fused.train.data.folder_scan import is_video_name

SEPARATORS = {"tab": "\t", "comma": ",", "semicolon": ";", "blank": " "}
PATH_MARKS = "./\\"  # no cell of a header holds one
COLUMNS = ("path", "label", "frames", "seconds", "skip")
NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
HEADER_WORDS = {
    word: column
    for column, words in (
        ("path", "path paths filepath videopath clippath video videos videoname videoid clip clips clipname file files "
                 "filename name folder foldername dir directory framedir framefolder"),
        ("label", "label labels labelid labelname labelindex class classes classid classname classlabel classindex "
                  "category categoryid categoryname target targets action actionid actionname"),
        ("frames", "frames numframes nframes totalframes framecount numberofframes numframe totalframe"),
        ("seconds", "seconds duration durations durationseconds durationsec durationins secs sec"),
        ("skip", "index unnamed:0"),
    )
    for word in words.split()
} | {"": "skip"}  # fmt: skip
"""Words of a header, in lower case and without blanks, dashes and underscores, and the column that each names."""

_QUOTE = "write a cell that holds the separator in double quotes"
_SEPARATOR_OPTION = "set separator (data.separator in a training)"
_COLUMNS_OPTION = "set columns (data.columns in a training), such as [path], [label, path] or [path, label, skip]"


class Line(NamedTuple):
    """A line of a text file; numbers count from 1."""

    number: int
    text: str


class Table(NamedTuple):
    """Columns of a list, its lines with a cell for each column, and notes on lines that were taken for a header."""

    columns: tuple[str, ...]
    rows: list[tuple[Line, list[str]]]
    notes: list[str]


def bad_line(file: Path, line: Line, problem: str) -> ValueError:
    """Return the error for a line of a list, which names it and shows it; the caller raises it."""
    text = line.text if len(line.text) <= 200 else line.text[:200] + "..."
    return ValueError(f"{file}, line {line.number}: {text!r} {problem}")


def are_columns(value: object) -> bool:
    """Return whether a value is a list or tuple of names of COLUMNS, with "path", and each but "skip" at most once."""
    if not isinstance(value, list | tuple) or not all(name in COLUMNS for name in value):
        return False
    read = [name for name in value if name != "skip"]
    return "path" in read and len(set(read)) == len(read)


def check_options(separator: str | None, columns: Sequence[str] | None) -> None:
    """Raise ValueError unless `separator` is a name or value of SEPARATORS, and `columns` are names of COLUMNS with "path"."""
    if separator is not None and separator not in (*SEPARATORS, *SEPARATORS.values()):
        raise ValueError(f"separator is {separator!r}; allowed: one of {', '.join(map(repr, SEPARATORS))}, or None to find out")
    if columns is not None and not are_columns(columns):
        names = ", ".join(map(repr, COLUMNS))
        allowed = f"a sequence of {names}, 'path' among them, each but 'skip' at most once; or None to find out"
        raise ValueError(f"columns are {columns!r}; allowed: {allowed}")


def read_table(file: Path, lines: Sequence[Line], separator: str | None, columns: Sequence[str] | None) -> Table:
    """Return the columns and rows of a list that has at least one line.

    `separator` is a name or value of SEPARATORS, or None. None takes the one of tab, comma and semicolon that divides every
    line into equally many cells, two or more. If none does, lines that all end like a video file are paths, without labels;
    otherwise blanks and tabs separate. A cell may be in double quotes, as in CSV. Where blanks separate, the last word of a
    line is the label, or its last two words are the second and third column if they are numbers in every line. What stands
    before them is the path, with its blanks; its last word must not be a number.

    The first line is a header if all its cells are known (HEADER_WORDS), or if cells for path and label are among them. It is
    also one, and a note says so, if its cells hold no dot, slash or backslash, and a cell behind the first is a form of "label"
    or "class", or a column behind the first holds numbers in all lines but this one, or all other lines begin with the path of
    a video file. Any other first line names a video. Lines equal to the header are left out too.

    `columns` are names of COLUMNS in the order of the columns ("skip" for one that is not read), or None. None takes those of a
    header that names path and label; columns under other words are not read then, and a note names them. Otherwise one column
    is the path, two are path and label, and for three the second and third column decide:

        names     numbers                          path, label, seconds
        integers  names                            path, frames, label
        integers  numbers, some with a fraction    path, label, seconds if all paths end like a video file
        integers  integers                         path, frames, label if no path ends like a video file

    Raises ValueError for everything else; the message shows a line and says which option decides.
    """
    check_options(separator, columns)
    count = None if columns is None else len(columns)
    if count == 1:
        rows = [[_unquote(line.text)] for line in lines]
    elif separator is not None:
        rows = _split_all(file, lines, SEPARATORS.get(separator, separator), count, least=2)
    else:
        rows = _find_rows(file, lines, count)
    named = _find_header(rows)
    body, notes = list(zip(lines, rows, strict=True)), []
    if named is not None:
        first = lines[0]
        body = [(line, cells) for line, cells in body if line.text != first.text]
        if None in named or len(named) == 1:
            notes.append(f"{file}, line {first.number}: {first.text!r} is taken for a header")
        if len(body) < len(lines) - 1:
            notes.append(f"{file}: {len(lines) - 1 - len(body)} further lines equal to the header are left out")
        if columns is None and {"path", "label"} <= set(named) and None in named:
            unread = ", ".join(repr(cell) for cell, name in zip(rows[0], named, strict=True) if name is None)
            notes[0] += f"; columns that are not read: {unread}"
    return Table(tuple(columns or _columns_of(file, lines[0], named, body)), body, notes)


def _find_rows(file: Path, lines: Sequence[Line], count: int | None) -> list[list[str]]:
    """Return the cells of every line by the separator that fits, `count` in each if it is given."""
    fits = {}
    for name, separator in SEPARATORS.items():
        if name != "blank" and not all(separator in line.text for line in lines):
            continue
        try:
            rows = _split_all(file, lines, separator, count)
        except ValueError:
            continue
        if len(rows[0]) > 1:
            fits[name] = rows
    blank = fits.pop("blank", None)
    if len(fits) > 1:
        raise bad_line(file, lines[0], f"and all others can be divided by {' or by '.join(fits)}; {_SEPARATOR_OPTION}")
    if fits:
        [(name, rows)] = fits.items()
        if blank and blank != rows and _looks_right(blank) and not _looks_right(rows):
            raise bad_line(file, lines[0], f"and all others can be divided by {name} or by blank; {_SEPARATOR_OPTION}")
        return rows
    paths = [[_unquote(line.text)] for line in lines]
    first_is_path = is_video_name(paths[0][0]) or not any(mark in lines[0].text for mark in PATH_MARKS)
    if count is None and first_is_path and all(is_video_name(path) for (path,) in paths[1:] or paths):
        return paths
    if blank and _looks_right(blank) and not any(cells[0].endswith((",", ";")) for cells in blank):
        return blank
    used = {name: sum(separator in line.text for line in lines) for name, separator in SEPARATORS.items()}
    others = max(("tab", "comma", "semicolon"), key=lambda name: used[name])
    if used[others]:  # in some lines only, or unequally often
        return _split_all(file, lines, SEPARATORS[others], count, least=2)
    if not used["blank"]:
        return paths
    if not blank:
        return _split_all(file, lines, " ", count, least=2)
    long = [line for line in lines if len(_split_blanks(line.text)) > 2]
    if long and count is None:
        raise bad_line(file, long[0], f"has several blanks; {_QUOTE}, or {_SEPARATOR_OPTION}, or {_COLUMNS_OPTION}")
    return blank


def _split_all(file: Path, lines: Sequence[Line], separator: str, count: int | None, least: int = 1) -> list[list[str]]:
    """Return the cells of every line. Raise ValueError for a line that has not `count` cells, or not as many as most lines."""
    rows = []
    for line in lines:
        try:
            rows.append(_split_blanks(line.text) if separator == " " else _split(line.text, separator))
        except csv.Error as error:
            raise bad_line(file, line, f"has double quotes that do not enclose a cell ({error})") from error
    fewest = min(map(len, rows))
    if separator == " " and fewest >= (count or 2):
        numbers = fewest > 2 and all(NUMBER.fullmatch(cell) for cells in rows[1:] or rows for cell in cells[-2:])
        usual = count or (3 if numbers else 2)
        for i, line in enumerate(lines):
            if len(rows[i]) > usual and '"' not in line.text:
                rows[i] = _split_last(line.text, usual)
                *before, last = rows[i][0].split()
                if count is None and NUMBER.fullmatch(last):
                    raise bad_line(file, line, f"has a number after a blank in its path; {_QUOTE}, or {_COLUMNS_OPTION}")
                if count is None and any(map(is_video_name, before)) and not is_video_name(last):
                    raise bad_line(file, line, f"has several words behind the name of a file; {_QUOTE}, or {_COLUMNS_OPTION}")
        count = usual
    usual = count or max(least, Counter(map(len, rows)).most_common(1)[0][0])
    for line, cells in zip(lines, rows, strict=True):
        if len(cells) != usual:
            name = next(name for name, value in SEPARATORS.items() if value == separator)
            problem = f"has not {usual} columns but {len(cells)}, if {name} separates them"
            way_out = f"allowed is path,label in each line, or path alone: {_QUOTE}, or {_SEPARATOR_OPTION}"
            raise bad_line(file, line, f"{problem}; {way_out}")
    return rows


def _split(text: str, separator: str) -> list[str]:
    """Return the cells of a line, without empty ones at its end. Raise csv.Error for quotes that do not enclose a cell."""
    if '"' in text:
        cells = next(csv.reader([text], delimiter=separator, skipinitialspace=True, strict=True))
    else:
        cells = text.split(separator)
    cells = [cell.strip() for cell in cells]
    while len(cells) > 1 and not cells[-1]:
        del cells[-1]
    return cells


def _split_blanks(text: str) -> list[str]:
    """Return the words of a line; those in double quotes may hold blanks."""
    return [cell for cell in _split(text.replace("\t", " "), " ") if cell]


def _split_last(text: str, count: int) -> list[str]:
    """Return `count` cells of a line that has at least as many words: all but the first are one word each."""
    match = re.fullmatch("(.+?)" + r"[ \t]+([^ \t]+)" * (count - 1), text)
    return list(match.groups()) if match else []


def _unquote(text: str) -> str:
    """Return a line that is one cell, without quotes around it."""
    try:
        cells = _split(text, ",") if text.startswith('"') else []
    except csv.Error:
        cells = []
    return cells[0] if len(cells) == 1 else text


def _looks_right(rows: Sequence[Sequence[str]]) -> bool:
    """Return whether all lines, the first one aside, have a path of a video file or a number in the same column."""
    body = rows[1:] or rows
    columns = list(zip(*body, strict=True))
    return all(map(is_video_name, columns[0])) or any(all(map(NUMBER.fullmatch, column)) for column in columns[1:])


def _find_header(rows: Sequence[Sequence[str]]) -> tuple[str | None, ...] | None:
    """Return the column that each word of the first row names, None for an unknown word; None if the row is no header."""
    first, body = rows[0], rows[1:]
    known = tuple(HEADER_WORDS.get(re.sub(r"[\s_-]", "", cell.lower())) for cell in first)
    if None not in known or {"path", "label"} <= set(known):
        return known
    if not body or not first[0] or any(mark in cell for cell in first for mark in PATH_MARKS):
        return None
    columns = list(zip(*body, strict=True))
    numbers = [all(map(NUMBER.fullmatch, column)) for column in columns]
    above_numbers = any(numbers[i] and not NUMBER.fullmatch(first[i]) for i in range(1, len(first)))
    words = [cell.lower() for name, cell in zip(known, first, strict=True) if name == "label"]
    named_label = known[0] != "label" and any("label" in word or "class" in word for word in words)
    return known if above_numbers or named_label or all(map(is_video_name, columns[0])) else None


def _columns_of(
    file: Path, first: Line, named: Sequence[str | None] | None, body: Sequence[tuple[Line, Sequence[str]]]
) -> tuple[str, ...]:
    """Return what the columns hold, by the header if it says so, else by their cells. `named` is that of `_find_header`.

    Raises ValueError for a header that names a column twice, or another column than the cells tell.
    """
    if named is None or len(named) == 1:
        return _find_columns(file, body)
    columns, read = tuple(name or "skip" for name in named), [name for name in named if name not in (None, "skip")]
    all_known = None not in named
    if are_columns(columns) and (all_known or "label" in named):
        return columns
    if all_known or len(set(read)) < len(read):
        raise bad_line(file, first, f"is a header that names no path, or a column twice; {_COLUMNS_OPTION}")
    found = _find_columns(file, body)
    for number, (name, other) in enumerate(zip(named, found, strict=True), 1):
        if name not in (None, "path", "skip", other):
            raise bad_line(file, first, f"names column {number} {name}, whose cells are those of {other}; {_COLUMNS_OPTION}")
    return found


def _find_columns(file: Path, body: Sequence[tuple[Line, Sequence[str]]]) -> tuple[str, ...]:
    """Return what the columns hold, by the rules of `read_table`."""
    if not body:
        return ("path",)
    line, cells = body[0]
    if len(cells) > 3:
        raise bad_line(file, line, f"has {len(cells)} columns; allowed: up to three, or {_COLUMNS_OPTION}")
    columns = list(zip(*(cells for _, cells in body), strict=True))
    if any(all(map(is_video_name, column)) for column in columns[1:]):
        raise bad_line(file, line, f"has a path behind the first column; {_COLUMNS_OPTION}")
    if len(cells) < 3:
        return ("path", "label")[: len(cells)]
    second_integers = all(re.fullmatch("[0-9]+", cell) for cell in columns[1])
    third_numbers = all(map(NUMBER.fullmatch, columns[2]))
    fraction = third_numbers and any(float(cell) % 1 for cell in columns[2])
    video_files = [is_video_name(path) for path in columns[0]]
    if third_numbers and (not any(map(NUMBER.fullmatch, columns[1])) or (second_integers and fraction and all(video_files))):
        return ("path", "label", "seconds")
    if second_integers and not fraction and (not any(map(NUMBER.fullmatch, columns[2])) or not any(video_files)):
        return ("path", "frames", "label")
    raise bad_line(file, line, f"has three columns: path,label,seconds or path,frames,label? {_COLUMNS_OPTION}")
