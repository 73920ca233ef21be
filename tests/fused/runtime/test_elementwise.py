"""Elementwise functions give every element the same bits, wherever it lies and however many threads there are."""

import pytest
import torch
import torch.nn.functional as F

from fused.runtime.elementwise import SHARE, by_vectors, clipwise, empty_vectors, whole_vectors


@pytest.fixture(params=[1, 2, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("function", [torch.exp2, F.softplus, F.silu], ids=lambda f: f.__name__)
@pytest.mark.parametrize("size", [1, 7, 63, 65, SHARE - 1, SHARE + 1, 2 * SHARE + 17, 3 * SHARE + 5])
def test_an_element_has_the_same_bits_in_any_place(threads, function, size):
    g = torch.Generator().manual_seed(size)
    values = torch.randn(size, generator=g)
    expected = by_vectors(function, empty_vectors((size,)).copy_(values))
    for shift in (1, 13):
        moved = empty_vectors((size + shift,)).fill_(0.0)
        moved[shift:] = values
        assert torch.equal(by_vectors(function, moved)[shift:], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_keeps_shape_and_values(dtype):
    x = empty_vectors((3, 5, 7), dtype=dtype).copy_(torch.randn(3, 5, 7))
    y = by_vectors(torch.exp2, x)
    assert y.shape == x.shape and y.is_contiguous()
    torch.testing.assert_close(y, torch.exp2(x.clone()))


def test_a_thread_takes_whole_vectors(threads):
    for size in (0, 1, 64, 65, SHARE, SHARE + 1, 5 * SHARE + 3):
        total = whole_vectors(size)
        shares = min(threads, max(1, -(-total // SHARE)))
        assert size <= total < size + 64 * threads and total % (64 * shares) == 0


def test_two_clips_are_computed_one_by_one():
    """Where the vector loop of both ends, the bits of one would depend on the other."""
    shapes = []
    x = torch.randn(2, 3, 7)
    got = clipwise(lambda t: shapes.append(tuple(t.shape)) or F.silu(t), x)
    assert shapes == [(3, 7), (3, 7)] and torch.equal(got, torch.stack([F.silu(clip) for clip in x]))
