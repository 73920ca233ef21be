"""CUDA graphs: work on a GPU that is recorded once, and replayed without Python on the same memory.

A recording reads and writes tensors at the addresses that they had when it was made. Whoever replays it copies fresh input into
the tensors that it reads, and keeps alive what it reads.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any, Protocol, runtime_checkable

import torch

WARMUP = 3  # runs before a recording, in which kernels are compiled and libraries create their handles


@runtime_checkable
class Recording(Protocol):
    """Recorded work. `output` is what it returned; the tensors in it have values after a replay, and others after the next."""

    output: Any

    def replay(self) -> None:
        """Run the work again, on the memory that it was recorded with."""


@runtime_checkable
class Recorder(Protocol):
    """The maker of recordings that share scratch memory, so that no two of them may run at the same time."""

    def record(self, work: Callable[[], Any]) -> Recording:
        """Return the recording of `work`, which is called once and has no effect yet. Raise RuntimeError where it cannot be."""

    def warming(self) -> AbstractContextManager[object]:
        """Return the context in which work is run that will be recorded later."""

    def in_turn(self) -> AbstractContextManager[object]:
        """Return a context for replays and the copies around them, which wait for those of contexts before."""

    @property
    def memory_bytes(self) -> int:
        """The memory that the recordings hold beside their input."""


def warm(recorder: Recorder, work: Callable[[], Any]) -> None:
    """Run work that will be recorded WARMUP times."""
    with recorder.warming():
        for _ in range(WARMUP):
            work()


class _CudaRecording:
    """A captured graph."""

    def __init__(self, graph: torch.cuda.CUDAGraph, output: Any) -> None:
        self.output, self.replay = output, graph.replay


class CudaRecorder:
    """Recorder of CUDA graphs on one GPU, which share a memory pool."""

    def __init__(self, device: torch.device) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        with torch.cuda.device(self.device):
            # Work is warmed up on the stream that it is captured on: autograd's nodes belong to their first stream.
            self._stream = torch.cuda.Stream()
            self._pools = [torch.cuda.graph_pool_handle()]  # the last is in use, others belong to captures before a failed one
            self._last_use = torch.cuda.Event()

    def record(self, work: Callable[[], Any]) -> Recording:
        """Return the captured graph of `work`. Raise RuntimeError if it does what a graph cannot, such as reading a value."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.device):
            stream = torch.cuda.current_stream()
            # The graph is to use a workspace of its pool; that of the warm-up may be freed, and belong to others then.
            torch._C._cuda_clearCublasWorkspaces()
            try:
                # thread_local: other threads, which load data, may allocate during the capture
                with torch.cuda.graph(graph, self._pools[-1], self._stream, capture_error_mode="thread_local"):
                    output = work()
            except RuntimeError as error:
                torch.cuda.set_stream(stream)  # which the context does not where the end of the capture fails
                self._undo_capture()
                cause = error
                while isinstance(cause.__context__, RuntimeError):  # the first error explains those that it caused
                    cause = cause.__context__
                raise RuntimeError(str(cause).strip().partition("\n")[0]) from error
            finally:
                torch._C._cuda_clearCublasWorkspaces()  # back to the pool
        return _CudaRecording(graph, output)

    def _undo_capture(self) -> None:
        """Undo what PyTorch leaves undone where the end of a capture fails."""
        # the default generator goes on counting for the graph
        generator = torch.cuda.default_generators[self.device.index]
        generator.graphsafe_set_state(generator.clone_state())
        # the allocator frees no memory that several streams used until the capture has ended
        with suppress(RuntimeError):  # it has
            torch._C._cuda_endAllocateToPool(self.device.index, self._pools[-1])
        self._pools.append(torch.cuda.graph_pool_handle())  # PyTorch 2.11 gives the pool to no other capture

    @contextmanager
    def warming(self) -> Iterator[None]:
        """Run the block's work on the capture's stream, in order with what is before and behind it."""
        with torch.cuda.device(self.device):
            current = torch.cuda.current_stream()
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                yield
            current.wait_stream(self._stream)

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """Let the current stream wait for the block before, which another stream may have run."""
        with torch.cuda.device(self.device):
            stream = torch.cuda.current_stream()
            stream.wait_event(self._last_use)
            yield
            self._last_use.record(stream)

    @property
    def memory_bytes(self) -> int:
        """The size of the pools, which hold the scratch memory and the output of all graphs."""
        segments, pools = torch.cuda.memory_snapshot(), [tuple(pool) for pool in self._pools]
        return sum(s["total_size"] for s in segments if tuple(s.get("segment_pool_id", ())) in pools)
