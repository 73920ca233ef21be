"""Recordings of CUDA graphs: fresh data, the memory they hold, and what a capture that fails leaves behind."""

import pytest
import torch

from fused.runtime.graphs import CudaRecorder

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
MIB = 2**20


def test_replays_and_memory() -> None:
    recorder = CudaRecorder(torch.device("cuda"))
    x = torch.ones(4 * MIB, device="cuda")
    with recorder.warming():
        (x * 2).sum()
    recording = recorder.record(lambda: (x * 2 + 1).sum())
    for value in (1.0, 3.0):
        x.fill_(value)
        with recorder.in_turn():
            recording.replay()
            assert recording.output.item() == 4 * MIB * (2 * value + 1)
    assert 16 * MIB <= recorder.memory_bytes <= 128 * MIB


def test_replays_write_to_memory_of_the_graph_alone() -> None:
    """cuBLAS has a workspace for each stream, which a library in the same process may free, as torch.compile does."""
    recorder = CudaRecorder(torch.device("cuda"))
    weight = torch.randn(2048, 2048, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(8, 2048, device="cuda", dtype=torch.bfloat16)
    with recorder.warming():
        expected = x @ weight
    recording = recorder.record(lambda: x @ weight)
    torch._C._cuda_clearCublasWorkspaces()
    with torch.cuda.stream(recorder._stream):
        others = [torch.full((MIB,), -1.0, device="cuda") for _ in range(64)]
    torch.cuda.synchronize()
    recording.replay()
    torch.cuda.synchronize()
    assert torch.equal(recording.output, expected)
    assert all(torch.equal(other, torch.full_like(other, -1.0)) for other in others)


def test_random_numbers_follow_the_seed() -> None:
    recorder = CudaRecorder(torch.device("cuda"))
    recording = recorder.record(lambda: torch.rand(8, device="cuda"))
    for seed in (1, 2, 1):
        torch.manual_seed(seed)
        recording.replay()
        torch.manual_seed(seed)
        assert torch.equal(recording.output, torch.rand(8, device="cuda"))


def test_a_capture_that_fails() -> None:
    """The error names the first cause; random numbers, the current stream, memory and further recordings are as before."""
    recorder = CudaRecorder(torch.device("cuda"))
    x, stream = torch.ones(8, device="cuda"), torch.cuda.current_stream()
    with pytest.raises(RuntimeError, match="captur"):
        recorder.record(lambda: torch.rand(8, device="cuda").sum().item())
    assert torch.cuda.current_stream() == stream
    torch.manual_seed(3)
    first = torch.rand(8, device="cuda")
    torch.manual_seed(3)
    assert torch.equal(first, torch.rand(8, device="cuda"))
    other = torch.cuda.Stream()
    torch.cuda.synchronize()
    before = torch.cuda.memory_reserved()
    for _ in range(40):
        with torch.cuda.stream(other):
            large = torch.empty(16 * MIB, device="cuda")
        large.record_stream(stream)
        del large
        torch.cuda.synchronize()
    assert torch.cuda.memory_reserved() - before <= 256 * MIB
    recording = recorder.record(lambda: x + torch.rand(8, device="cuda"))
    torch.manual_seed(3)
    recording.replay()
    assert torch.equal(recording.output, x + first)


def test_on_another_stream() -> None:
    """A replay waits for the one before, on whichever stream it was."""
    recorder = CudaRecorder(torch.device("cuda"))
    x = torch.zeros(MIB, device="cuda")
    recording = recorder.record(lambda: x + 1)
    torch.cuda.synchronize()
    found = []
    for value, stream in ((1.0, torch.cuda.Stream()), (2.0, torch.cuda.Stream()), (3.0, torch.cuda.current_stream())):
        with torch.cuda.stream(stream), recorder.in_turn():
            torch.cuda._sleep(10_000_000)
            x.fill_(value)
            recording.replay()
            found.append(recording.output.clone())
    torch.cuda.synchronize()
    assert [y.unique().tolist() for y in found] == [[2.0], [3.0], [4.0]]
