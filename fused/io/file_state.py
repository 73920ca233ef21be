"""The state of a video on disk, by which a later run sees that it was changed."""

import os
from pathlib import Path
from typing import NamedTuple


class FileState(NamedTuple):
    """The size of a file, or of all files in a folder of images, and the last time when it was changed."""

    bytes: int
    modified: int  # nanoseconds since 1970


def file_state(path: Path) -> FileState | None:
    """Return the state of a video, which is a file or a folder of images, or None if it cannot be looked up.

    Of a folder, the time is that of the file, or of the folder's list of names, that was changed last.
    """
    try:
        states = [os.stat(path)]
        if os.path.isdir(path):
            with os.scandir(path) as entries:
                states += [entry.stat() for entry in entries]
    except (OSError, ValueError):  # ValueError: a name that no file system has
        return None
    return FileState(sum(state.st_size for state in states), max(state.st_mtime_ns for state in states))
