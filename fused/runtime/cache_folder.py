"""The user's cache folder, in which compiled kernels and validation stamps are kept."""

import os
from pathlib import Path


def cache_folder(name: str) -> Path:
    """Return $XDG_CACHE_HOME/videomamba-bench/`name`, with ~/.cache for an unset variable. The folder may not exist yet.

    For a user without a home folder, as in containers with any user's number, it is one that cannot be written.
    """
    home = os.path.expanduser("~")
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(home if os.path.isabs(home) else os.devnull, ".cache")
    return Path(base) / "videomamba-bench" / name
