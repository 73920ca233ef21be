"""Machine code kept on disk, for many processes at once: $XDG_CACHE_HOME (or ~/.cache) /videomamba-bench/cubins.

A file is a digest and the machine code. It is written beside its place and then renamed into it, so that a reader finds it
whole or not at all; one whose digest does not fit is made again. A folder that cannot be written costs the next process a
compilation, no more.
"""

import functools
import hashlib
import logging
from collections.abc import Callable
from pathlib import Path

from fused.io.atomic_write import atomic_write
from fused.runtime.cache_folder import cache_folder

_log = logging.getLogger("fused")


def folder() -> Path:
    """Where the files are."""
    return cache_folder("cubins")


def kept(parts: tuple[object, ...], make: Callable[[], bytes]) -> bytes:
    """The machine code that `parts` (whatever it depends on) name, from disk, or from `make` and then kept."""
    path = folder() / f"{hashlib.sha256(repr(parts).encode()).hexdigest()[:32]}.cubin"
    code = _read(path)
    if code is None:
        code = make()
        try:
            _write(path, code)
        except OSError as error:
            _warn(str(path.parent), str(error))
    return code


def _read(path: Path) -> bytes | None:
    """What the file holds, or None if it is not there, cannot be read, or is not what was written."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    digest, code = content[:32], content[32:]
    return code if code and hashlib.sha256(code).digest() == digest else None


def _write(path: Path, code: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as draft:
        draft.write_bytes(hashlib.sha256(code).digest() + code)


@functools.cache
def _warn(place: str, reason: str) -> None:
    """Once per process and folder."""
    _log.warning("compiled kernels cannot be kept in %s, every process compiles its own: %s", place, reason)
