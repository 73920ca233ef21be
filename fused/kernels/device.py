"""Where a kernel launches: on the current stream of its tensors' device, whichever device is current, or beside it."""

from contextlib import AbstractContextManager, nullcontext

import torch

_HERE: AbstractContextManager[object] = nullcontext()


def launching_on(device: torch.device) -> AbstractContextManager[object]:
    """A context in which `device` is current; free of charge where it already is, and on a CPU (Triton's interpreter)."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device(device)
