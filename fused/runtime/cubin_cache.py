"""Compiled kernels (cubins) kept in the user's cache folder, safe for many processes at once.

A file holds a SHA-256 digest and the machine code, or the names of such files. It is written to a draft and renamed, so a
reader never sees half of it. A file whose digest does not fit is compiled again. If the folder cannot be written, every
process compiles its own kernels.
"""

import functools
import hashlib
import logging
from collections.abc import Callable
from pathlib import Path

from fused.io.atomic_write import atomic_write
from fused.runtime.cache_folder import cache_folder

_log = logging.getLogger("fused")
_DIGEST_BYTES = 32


def folder() -> Path:
    """Return the folder of the files; it may not exist yet."""
    return cache_folder("cubins")


def path_of(key: tuple[object, ...]) -> Path:
    """Return the file of a key, which holds everything that the machine code depends on; its repr is hashed."""
    return folder() / f"{hashlib.sha256(repr(key).encode()).hexdigest()[:32]}.cubin"


def cached(key: tuple[object, ...], compile_cubin: Callable[[], bytes]) -> bytes:
    """Return the machine code of `key` from disk, or that of `compile_cubin()`, which is then kept."""
    path = path_of(key)
    cubin = read(path)
    if cubin is None:
        cubin = compile_cubin()
        keep(path, cubin)
    return cubin


def keep(path: Path, cubin: bytes) -> None:
    """Write machine code and its digest; a folder that cannot be written is only warned of."""
    try:
        write(path, cubin)
    except OSError as error:
        warn_once(str(path.parent), str(error))


def read(path: Path) -> bytes | None:
    """Return the machine code in a file, or None if the file is missing, unreadable or damaged."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    digest, cubin = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
    return cubin if cubin and hashlib.sha256(cubin).digest() == digest else None


def write(path: Path, cubin: bytes) -> None:
    """Write machine code and its digest. Raises OSError if the folder cannot be written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as draft:
        draft.write_bytes(hashlib.sha256(cubin).digest() + cubin)


@functools.cache
def warn_once(path: str, reason: str) -> None:
    """Log a warning, once per process and folder."""
    _log.warning("compiled kernels cannot be kept in %s, every process compiles its own: %s", path, reason)
