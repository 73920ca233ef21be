"""Modes of the native kernels that a caller enters for a while."""

import contextlib
from collections.abc import Iterator

_batch_invariant = False


@contextlib.contextmanager
def batch_invariant(on: bool = True) -> Iterator[None]:
    """Make the native scan split time as for a batch of one inside the context: a clip's bits do not depend on its neighbours.

    Outside, the splits depend on the size of the batch, which is faster where the clips alone fill the GPU.
    """
    global _batch_invariant
    previous, _batch_invariant = _batch_invariant, on
    try:
        yield
    finally:
        _batch_invariant = previous


def is_batch_invariant() -> bool:
    """Return whether `batch_invariant` is on."""
    return _batch_invariant
