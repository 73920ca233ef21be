"""Atomic writes: at any moment a file has its old content or all of its new content."""

import contextlib
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

STALE = 3600.0  # seconds without a write, after which a draft belongs to a process that was killed


class NotWritten(OSError):
    """The error for a file that could not be written; the message names it, the free space, and the reason."""


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield the path of a draft in the same folder, for the caller to write; on leaving, it replaces `path` in one step.

    Until then the old file stays at `path`, and it stays for good if writing fails or the process is killed. A failure leaves
    no draft. The draft of a killed process is deleted by the next write of the same file that is at least an hour later.
    Raises NotWritten, an OSError, for any failure to write.
    """
    for old in path.parent.glob(f".{path.name}.*.part"):
        with contextlib.suppress(FileNotFoundError):  # another process was quicker
            if time.time() - old.stat().st_mtime > STALE:
                old.unlink()
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        yield draft
        with open(draft, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(draft, path)
    except NotWritten:  # of another file that is written within this context
        raise
    except Exception as error:
        free = shutil.disk_usage(path.parent).free / 2**20 if path.parent.is_dir() else 0.0
        raise NotWritten(
            f"{path}: not written, what was there before stays ({free:.0f} MiB are free there): {error}"
        ) from error
    finally:
        draft.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # makes the rename itself survive a power cut; not every file system can
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
