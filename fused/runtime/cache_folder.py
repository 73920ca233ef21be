"""The user's cache folder, in which compiled kernels and validation stamps are kept."""

import os
from pathlib import Path


def cache_folder(name: str) -> Path:
    """Return $XDG_CACHE_HOME/videomamba-bench/`name`, with ~/.cache for an unset variable. The folder may not exist yet."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "videomamba-bench" / name
