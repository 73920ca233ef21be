"""Modes of the native kernels that a caller enters for a while."""

import contextlib
from collections.abc import Iterator

_batch_invariant = False


@contextlib.contextmanager
def batch_invariant(on: bool = True) -> Iterator[None]:
    """Within, the native scan splits time as for a batch of one, so that a clip's bits do not depend on its neighbours.

    Outside, how it splits time depends on the size of the batch, which is faster where the clips alone fill the GPU.
    """
    global _batch_invariant
    before, _batch_invariant = _batch_invariant, on
    try:
        yield
    finally:
        _batch_invariant = before


def is_batch_invariant() -> bool:
    """Return whether `batch_invariant` is on."""
    return _batch_invariant
