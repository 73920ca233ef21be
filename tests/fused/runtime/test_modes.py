"""Modes of the kernels last as long as their context."""

import pytest

from fused.runtime.modes import batch_invariant, is_batch_invariant


def test_a_mode_within_a_mode_gives_it_back() -> None:
    with batch_invariant():
        with batch_invariant(False):
            assert not is_batch_invariant()
        assert is_batch_invariant()
    assert not is_batch_invariant()


def test_an_error_ends_a_mode() -> None:
    with pytest.raises(KeyError), batch_invariant():
        raise KeyError
    assert not is_batch_invariant()
