"""Lists of conversations as LLaVA's data have them: JSON, or JSON lines.

    {"id": "7", "video": "film.mp4", "conversations": [{"from": "human", "value": "<video>\\nWho enters?"},
                                                       {"from": "gpt", "value": "A rabbit."}]}

An entry has a `video` (a file, or a folder of images), an `image`, or neither. The tag <video> or <image> stands once in the
first question, where the file belongs; LLaVA-Video writes <image> for videos too. Roles are human, gpt and system, or user
and assistant; `role` and `content` in place of `from` and `value` are read too. The last turn is an answer.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fused.models.conversation.turns import Turn

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
IMAGE_TAG, VIDEO_TAG = "<image>", "<video>"
SHOWN = 5  # wrong entries in an error


class Entry(NamedTuple):
    """A conversation. The text of its first question holds VIDEO_TAG, without a newline behind, if there is a file."""

    name: str
    turns: tuple[Turn, ...]
    file: Path | None
    is_image: bool


def read_entries(path: Path, prefix: Path | None = None) -> list[Entry]:
    """Return the entries of a list. Files are looked for in the folder `prefix` (None: that of the list).

    Raises FileNotFoundError without the list, and ValueError for one that is no JSON, that is empty, and for wrong entries: how
    many there are, and what is wrong with the first.
    """
    found = _read(path)
    if not found:
        raise ValueError(f"{path} is empty; allowed: a JSON list of entries, or an entry in each line")
    entries, wrong = [], []
    for number, given in enumerate(found):
        try:
            entries.append(_entry(given, f"{path.name}#{number}", prefix or path.parent))
        except ValueError as error:
            wrong.append(f"entry {number}{_id(given)}: {error}")
    if wrong:
        more = f"; and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
        raise ValueError(f"{path}: {len(wrong)} of {len(found)} entries are wrong: {'; '.join(wrong[:SHOWN])}{more}")
    return entries


def _read(path: Path) -> list[Any]:
    """Return the objects of a list."""
    try:
        text = path.read_text(encoding="utf-8-sig")  # some editors put a mark in front of UTF-8
        if text.lstrip().startswith("["):
            return json.loads(text)
    except (ValueError, RecursionError) as error:  # no UTF-8, no JSON, or lists in lists in lists
        raise ValueError(f"{path} is no JSON: {error}") from error
    found = []
    for number, line in enumerate(text.split("\n"), 1):  # a text may hold other ends of lines, such as U+2028
        if line.strip():
            try:
                found.append(json.loads(line))
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}, line {number} is no JSON: {error}; allowed: a list, or an object a line") from error
    return found


def _entry(given: Any, name: str, folder: Path) -> Entry:
    """Return an entry. Raises ValueError that says what is wrong with it."""
    if not isinstance(given, Mapping):
        raise ValueError(f"it is a {type(given).__name__}; allowed: an object with the key conversations")
    file, is_image = _file(given, folder)
    turns = [_turn(turn, i) for i, turn in enumerate(_turns(given))]
    spoken = [turn for turn in turns if turn.role != "system"]
    if any(turn.role == "system" for turn in turns[1:]):
        raise ValueError("a system turn is not the first; allowed: at the beginning only")
    for i, turn in enumerate(spoken):
        due = "assistant" if i % 2 else "user"
        if turn.role != due:
            raise ValueError(f"turn {i + len(turns) - len(spoken)} is of {turn.role}; allowed: questions and answers in turn")
    if len(spoken) % 2 or not spoken:
        raise ValueError("the last turn is no answer; allowed: an answer to every question")
    first = len(turns) - len(spoken)
    turns[first] = Turn("user", _placed(turns, first, file, is_image))
    return Entry(name, tuple(turns), file, is_image)


def _turns(given: Mapping[str, Any]) -> list[Any]:
    turns = given.get("conversations", given.get("messages"))
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"conversations is {turns!r}; allowed: a list of turns")
    return turns


def _turn(given: Any, number: int) -> Turn:
    """Return a turn. Raises ValueError for an unknown role, for a value that is not text, and for an empty text."""
    if not isinstance(given, Mapping):
        raise ValueError(f"turn {number} is {given!r}; allowed: an object with from and value")
    role, text = given.get("from", given.get("role")), given.get("value", given.get("content"))
    if not isinstance(role, str) or role not in ROLES:
        raise ValueError(f"turn {number} is from {role!r}; allowed: {', '.join(ROLES)}")
    if not isinstance(text, str):
        raise ValueError(f"turn {number} has the value {text!r}; allowed: a text")
    if not text.strip():
        raise ValueError(f"turn {number} is an empty {'answer' if ROLES[role] == 'assistant' else 'text'}; allowed: words")
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ValueError(f"turn {number} holds half of a letter of UTF-16, {text!r}; allowed: whole letters")
    return Turn(ROLES[role], text)


def _file(given: Mapping[str, Any], folder: Path) -> tuple[Path | None, bool]:
    """Return an entry's file, and whether it is an image. Raises ValueError for several, and for one that is not there."""
    named = {key: given[key] for key in ("video", "image") if given.get(key) is not None}
    if not named:
        return None, False
    if len(named) > 1:
        raise ValueError(f"it has a video, {named['video']!r}, and an image, {named['image']!r}; allowed: one of them")
    key, value = next(iter(named.items()))
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if not isinstance(value, str) or not value:
        raise ValueError(f"{key} is {value!r}; allowed: the path of one file")
    path = folder / value
    if not os.path.exists(path):  # Path.exists raises for a name that is too long
        raise ValueError(f"{key} is {value!r}, and there is no {path}; data.prefix names the folder of the files")
    return path, key == "image"


def _placed(turns: list[Turn], first: int, file: Path | None, is_image: bool) -> str:
    """Return the text of the first question with VIDEO_TAG in the place of its tag. Raises ValueError for wrong tags."""
    tags = {tag: sum(turn.text.count(tag) for turn in turns if turn.role != "assistant") for tag in (IMAGE_TAG, VIDEO_TAG)}
    count, text = sum(tags.values()), turns[first].text
    if file is None:
        if count:
            tag = next(tag for tag, times in tags.items() if times)
            raise ValueError(f"it has the tag {tag} and no file; allowed: a video or an image beside it, or no tag")
        return text
    kind = "image" if is_image else "video"
    if not count:
        allowed = IMAGE_TAG if is_image else f"{VIDEO_TAG} or {IMAGE_TAG}"
        raise ValueError(f"it has the {kind} {file.name!r} and no tag; allowed: {allowed} in the first question")
    if count > 1:
        raise ValueError(f"it has {count} tags {IMAGE_TAG} and {VIDEO_TAG}; allowed: one, for its {kind}")
    if is_image and tags[VIDEO_TAG]:
        raise ValueError(f"it has the tag {VIDEO_TAG} and the image {file.name!r}; allowed: {IMAGE_TAG}")
    tag = VIDEO_TAG if tags[VIDEO_TAG] else IMAGE_TAG
    if tag not in text:
        raise ValueError(f"its tag {tag} stands in a later turn; allowed: in the first question")
    before, after = text.split(tag)
    return f"{before}{VIDEO_TAG}{after.removeprefix(chr(10))}"


def _id(given: Any) -> str:
    """Return the id of an entry in words."""
    return f" (id {given['id']!r})" if isinstance(given, Mapping) and "id" in given else ""
