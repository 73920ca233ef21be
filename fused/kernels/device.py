"""Where a kernel launches: on the current stream of its tensors' device, whichever device is current, or beside it."""

import functools
from contextlib import AbstractContextManager, nullcontext

import torch

_HERE: AbstractContextManager[object] = nullcontext()


def launching_on(device: torch.device) -> AbstractContextManager[object]:
    """A context in which `device` is current; free of charge where it already is, and on a CPU (Triton's interpreter)."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device(device)


class Branch(AbstractContextManager[None]):
    """Kernels launched within run on a second stream, after what was queued before the branch was made, and beside what was
    queued since; after it the current stream waits for them. Memory is to be allocated outside. `open` is False, and the branch
    the current stream, unless `wanted`, and while a CUDA graph is captured: the nodes of a model's graph start in an order of
    its own, which cost VideoMamba-M 5 % where the order of launches gains it 5 %."""

    def __init__(self, device: torch.device, wanted: bool) -> None:
        cuda = device.type == "cuda"
        self.open = wanted and not (cuda and torch.cuda.is_current_stream_capturing())
        self._streams = (_second(device), torch.cuda.current_stream(device)) if cuda and self.open else None
        if self._streams:
            self._streams[0].wait_stream(self._streams[1])

    def __enter__(self) -> None:
        if self._streams:
            self._within = torch.cuda.stream(self._streams[0])
            self._within.__enter__()

    def __exit__(self, *raised: object) -> None:
        if self._streams:
            self._within.__exit__(*raised)
            self._streams[1].wait_stream(self._streams[0])


@functools.cache
def _second(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
