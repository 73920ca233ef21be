"""Memory of the CPU that a thread uses again."""

import threading

import pytest
import torch

from fused.runtime import scratch
from fused.runtime.elementwise import whole_vectors
from fused.runtime.scratch import Scratch

LIKE = torch.empty(0)


def test_a_name_has_the_same_memory_in_every_call():
    first = Scratch(LIKE).tensor("test of memory", (3, 5)).fill_(1)
    second = Scratch(LIKE).tensor("test of memory", (15,))
    other = Scratch(LIKE).tensor("another test of memory", (3, 5)).fill_(2)
    assert first.data_ptr() == second.data_ptr() != other.data_ptr() and second.eq(1).all()


def test_memory_grows():
    small = Scratch(LIKE).tensor("test of growth", (7,)).fill_(1)
    large, steps = Scratch(LIKE).tensor_and_steps("test of growth", (300, 7))
    assert large.shape == (300, 7) and len(steps) == 300 and small.eq(1).all()
    large.zero_()
    steps[299].fill_(3)
    assert large[299].eq(3).all() and not large[:299].any() and small.eq(1).all()
    assert Scratch(LIKE).tensor("test of growth", (7,)).data_ptr() == large.data_ptr()


def test_dtypes_have_memory_of_their_own():
    single, double = (Scratch(torch.empty(0, dtype=t)).tensor("test of dtypes", (4,)) for t in (torch.float32, torch.float64))
    assert (single.dtype, double.dtype) == (torch.float32, torch.float64) and single.data_ptr() != double.data_ptr()


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_whole_vectors_lie_behind_a_tensor(threads):
    """Also of a number of threads that is set after the first call."""
    before = torch.get_num_threads()
    Scratch(LIKE).tensor("test of vectors", (2**17 + 1,))
    torch.set_num_threads(threads)
    try:
        x = Scratch(LIKE).tensor("test of vectors", (2**17 + 1,))
        assert x.untyped_storage().nbytes() >= 4 * whole_vectors(2**17 + 1)
    finally:
        torch.set_num_threads(before)


def test_memory_of_inference_mode_serves_outside_of_it():
    with torch.inference_mode():
        inside, _ = Scratch(LIKE).tensor_and_steps("test of modes", (2, 3))
    assert not inside.is_inference()
    _, steps = Scratch(LIKE).tensor_and_steps("test of modes", (2, 3))
    steps[1].add_(1)


def test_threads_do_not_share_memory():
    addresses = []

    def note():
        x = Scratch(LIKE).tensor("test of threads", (64,))
        addresses.append(x.data_ptr())
        barrier.wait()

    barrier = threading.Barrier(3)
    threads = [threading.Thread(target=note) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(addresses)) == 3


def test_views_of_many_shapes_are_not_kept():
    for length in range(1, 3 * scratch.SHAPES):
        memory = Scratch(LIKE)
        memory.tensor_and_steps("test of shapes", (length, 2))
        kept = memory.memory["test of shapes"]
        assert len(kept.views) <= scratch.SHAPES and len(kept.steps) <= scratch.SHAPES


def test_other_devices_get_new_memory():
    x = Scratch(torch.empty(0, device="meta")).tensor("test of devices", (2, 3))
    assert x.device.type == "meta" and x.shape == (2, 3)
