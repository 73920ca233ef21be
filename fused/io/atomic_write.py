"""Files that are there whole or not at all, whatever happens while they are written."""

import contextlib
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

STALE = 3600.0  # seconds without a write, after which a draft belongs to a process that was killed


class NotWritten(OSError):
    """A file could not be written; the message names it, the free space, and the reason."""


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Write to the path that this gives, a draft in the same folder; on leaving, it replaces `path` in one step.

    Until then, and for good if writing fails or the process is killed, what was at `path` stays. A failure leaves no draft;
    that of a killed process goes with the next write of the same file an hour later. Raises NotWritten, an OSError, for
    any failure to write.
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
    except NotWritten:  # of another file, written in the same step
        raise
    except Exception as error:
        free = shutil.disk_usage(path.parent).free / 2**20 if path.parent.is_dir() else 0.0
        raise NotWritten(
            f"{path}: not written, what was there before stays ({free:.0f} MiB are free there): {error}"
        ) from error
    finally:
        draft.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # that the folder outlives a power cut too; not every file system has this
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
